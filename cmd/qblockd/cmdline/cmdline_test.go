package cmdline

import (
	"strings"
	"testing"

	"qblockd/schema/types"
	"qblockd/schema/value"
)

var testOptions = []Option{
	{Long: "blockdev", Arg: true}, {Long: "help", Short: 'h'}, {Long: "trace", Short: 'T', Arg: true},
	{Long: "monitor", Arg: true}, {Long: "nbd-server", Arg: true}, {Long: "export", Arg: true}, {Long: "exit"},
}

func TestScan(t *testing.T) {
	for _, c := range []struct{ args, want, err string }{
		{"--blockdev a --monitor=b x", "blockdev(a) monitor(b) -(x)", ""},
		{"--b a -Tq -T q -hTq", "blockdev(a) trace(q) trace(q) help() trace(q)", ""},
		{"--n x -- --bogus y", "nbd-server(x)", ""},
		{"--ex x", "", "option '--ex' is ambiguous; possibilities: '--export' '--exit'"},
		{"--help --bogus", "help()", "unrecognized option '--bogus'"},
		{"--bogus=1", "", "unrecognized option '--bogus'"},
		{"--help=1", "", "option '--help' doesn't allow an argument"},
		{"--blockdev", "", "option '--blockdev' requires an argument"},
		{"-T", "", "option requires an argument -- 'T'"},
		{"-hx", "help()", "invalid option -- 'x'"},
		{"- x", "-(-) -(x)", ""},
	} {
		items, err := Scan(strings.Fields(c.args), testOptions)
		var got []string
		for _, it := range items {
			n := "-"
			if it.Option != nil {
				n = it.Option.Long
			}
			got = append(got, n+"("+it.Arg+")")
		}
		if g := strings.Join(got, " "); g != c.want {
			t.Errorf("%q: items %q, want %q", c.args, g, c.want)
		}
		if msg := errText(err); msg != c.err {
			t.Errorf("%q: error %q, want %q", c.args, msg, c.err)
		}
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestKeyval(t *testing.T) {
	for _, c := range []struct{ in, implied, want, err string }{
		{"a=1,b.c=2,b.d=x,,y", "", `a=1 b={c=2 d=x,y}`, ""},
		{"drv,a=b", "driver", `driver=drv a=b`, ""},
		{"l.0=a,l.1.x=b", "", `l=[a {x=b}]`, ""},
		{"l.1=a", "", "", "Parameter 'l.0' missing"},
		{"l.0=a,l.x=b", "", "", "Parameters 'l.*' used inconsistently"},
		{"a=1,a.b=2", "", "", "Parameters 'a.*' used inconsistently"},
		{"a.b=2,a=1", "", "", "Parameters 'a.*' used inconsistently"},
		{"a", "", "", "Expected '=' after parameter 'a'"},
		{"=x", "driver", "", "Invalid parameter ''"},
		{"0=x", "", "", "Invalid parameter '0'"},
		{"a..b=x", "", "", "Invalid parameter 'a..b'"},
		{"a=", "", "a=", ""},
		{"a=1,a=2", "", "a=2", ""},
		{strings.Repeat("a", 128) + "=x", "", "", "Parameter '" + strings.Repeat("a", 128) + "' is too long"},
		{"x." + strings.Repeat("a", 128) + "=x", "", "", "Parameter fragment '" + strings.Repeat("a", 128) + "' is too long"},
		{"x" + strings.Repeat(".a", 1000) + "=x", "", "", "Parameter with 1001 parts is nested too deeply"},
	} {
		d, _, err := Keyval(c.in, c.implied)
		if errText(err) != c.err {
			t.Errorf("%q: error %q, want %q", c.in, errText(err), c.err)
			continue
		}
		if err == nil && render(d) != "{"+c.want+"}" {
			t.Errorf("%q: %s, want {%s}", c.in, render(d), c.want)
		}
	}
	if _, help, err := Keyval("iothread,help", "qom-type"); err != nil || !help {
		t.Errorf("help: %v %v", help, err)
	}
}

func render(v value.Value) string {
	var parts []string
	switch v := v.(type) {
	case *value.Dict:
		for _, m := range v.Members() {
			parts = append(parts, m.Name+"="+render(m.Value))
		}
		return "{" + strings.Join(parts, " ") + "}"
	case value.List:
		for _, m := range v {
			parts = append(parts, render(m))
		}
		return "[" + strings.Join(parts, " ") + "]"
	}
	return v.(string)
}

func TestParseOpts(t *testing.T) {
	known := map[string]OptType{"backend": OptString, "path": OptString, "server": OptBool, "wait": OptBool,
		"delay": OptBool, "size": OptSize, "to": OptNumber}
	for _, c := range []struct{ in, want, warn, err string }{
		{"socket,id=a,path=x,,y,server,nowait", "a socket x,y true false",
			"short-form boolean option 'server' deprecated\nPlease use server=on instead|short-form boolean option 'nowait' deprecated\nPlease use wait=off instead", ""},
		{"socket,id=1", "", "", "Parameter 'id' expects an identifier"},
		{"socket,bogus=1", "", "", "Invalid parameter 'bogus'"},
		{"socket,server=maybe", "", "", "Parameter 'server' expects 'on' or 'off'"},
		{"socket,to=x", "", "", "Parameter 'to' expects a number"},
		{"socket,size=-1", "", "", "Parameter 'size' expects a non-negative number below 2^64"},
		{"socket,delay", " socket  false true", "short-form boolean option 'delay' deprecated\nPlease use nodelay=off instead", ""},
	} {
		o, err := ParseOpts(c.in, "backend", known)
		if errText(err) != c.err {
			t.Errorf("%q: error %q, want %q", c.in, errText(err), c.err)
		}
		if w := strings.Join(o.Warnings, "|"); w != c.warn {
			t.Errorf("%q: warnings %q, want %q", c.in, w, c.warn)
		}
		if err != nil {
			continue
		}
		b, _ := o.Get("backend")
		p, _ := o.Get("path")
		got := strings.Join([]string{o.ID, b, p, boolText(o.Bool("server", false)), boolText(o.Bool("wait", true))}, " ")
		if got != c.want {
			t.Errorf("%q: %q, want %q", c.in, got, c.want)
		}
	}
}

func boolText(b bool) string {
	if b {
		return "true"
	}
	return "false"
}

// TestSizes: those of the older options are read as those of the others.
func TestSizes(t *testing.T) {
	for in, want := range map[string]int64{"512": 512, "1k": 1024, "1.5K": 1536, "2M": 2 << 20, "0x10": 16, "7b": 7,
		"010": 10, " 64": 64, "+64": 64, "64.0": 64, ".5k": 512, "0x40E": 0x40e,
		"": -1, "x": -1, "-1": -1, "1.5": -1, "16E": -1, "1e3k": -1, "0x40k": -1, "0b1000": -1, "1_000": -1} {
		o, err := ParseOpts("size="+in, "", map[string]OptType{"size": OptSize})
		if got := o.Number("size"); (err == nil) != (want >= 0) || err == nil && got != uint64(want) {
			t.Errorf("%q: %d, %v, want %d", in, got, err, want)
		}
	}
}

func FuzzCommandLine(f *testing.F) {
	f.Add("a=1,b.0.c=2,,x", "driver")
	f.Fuzz(func(t *testing.T, s, implied string) {
		if !types.WellFormedID(implied) {
			implied = ""
		}
		_, _, _ = Keyval(s, implied)
		_, _ = ParseOpts(s, implied, map[string]OptType{"a": OptBool, "b": OptSize})
	})
}
