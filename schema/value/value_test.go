package value

import (
	"fmt"
	"math"
	"os/exec"
	"strings"
	"testing"
)

func TestAppendString(t *testing.T) {
	for in, want := range map[string]string{
		"":                     `""`,
		"plain / <>&'~ ":       `"plain / <>&'~ "`,
		"\"\\\b\f\n\r\t":       `"\"\\\b\f\n\r\t"`,
		"\x00\x01\x1f\x7f":     `"\u0000\u0001\u001F\u007F"`,
		"\xc0\x80":             `"\u0000"`,
		"é中☃":                  `"\u00E9\u4E2D\u2603"`,
		"😀\U0010fffd":          `"\uD83D\uDE00\uDBFF\uDFFD"`,
		"\xff\xfe":             `"\uFFFD\uFFFD"`,
		"\x80a":                `"\uFFFDa"`,
		"\xe4\xb8a":            `"\uFFFDa"`,
		"\xed\xa0\x80":         `"\uFFFD"`,
		"\xc1\x81":             `"\uFFFD"`,
		"\xf8\x88\x80\x80\x80": `"\uFFFD"`,
		"\uffff\ufdd0":         `"\uFFFD\uFFFD"`,
	} {
		if got := string(AppendString(nil, in)); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestAppendDouble(t *testing.T) {
	for in, want := range map[float64]string{
		0.1: "0.10000000000000001", 1: "1", 1e10: "10000000000", 1e16: "10000000000000000", 1e17: "1e+17",
		1.5e-7: "1.4999999999999999e-07", 0.0001: "0.0001", 0.00001: "1.0000000000000001e-05", 123456789.125: "123456789.125",
		5e-324: "4.9406564584124654e-324", math.MaxFloat64: "1.7976931348623157e+308",
		math.Inf(1): "inf", math.Inf(-1): "-inf", math.Copysign(0, -1): "-0", 1e100: "1e+100", 100000: "100000",
	} {
		if got := string(AppendDouble(nil, in)); got != want && in != 0 {
			t.Errorf("%v: %s, want %s", in, got, want)
		}
	}
	if got := string(AppendDouble(nil, math.Copysign(0, -1))); got != "-0" {
		t.Errorf("-0: %s", got)
	}
}

// TestAppendDoubleC compares with the C library's printf, as bash offers it to no more than long
// doubles; awk takes doubles.
func TestAppendDoubleC(t *testing.T) {
	awk, err := exec.LookPath("awk")
	if err != nil {
		t.Skipf("SKIPPED: no awk: %v", err)
	}
	var prog, want strings.Builder
	prog.WriteString("BEGIN {")
	x := uint64(88172645463325252)
	for range 2000 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		f := math.Float64frombits(x)
		if math.IsNaN(f) || math.IsInf(f, 0) || math.Abs(f) < 1e-290 || math.Abs(f) > 1e290 {
			continue
		}
		// An exact way to hand a number over: an integer times a power of two.
		frac, exp := math.Frexp(f)
		fmt.Fprintf(&prog, "printf \"%%.17g\\n\", %d * 2^(%d);", int64(frac*(1<<53)), exp-53)
		fmt.Fprintf(&want, "%s\n", AppendDouble(nil, f))
	}
	prog.WriteString("}")
	out, err := exec.Command(awk, prog.String()).Output()
	if err != nil {
		t.Skipf("SKIPPED: awk: %v", err)
	}
	got, exp := strings.Split(string(out), "\n"), strings.Split(want.String(), "\n")
	bad := 0
	for i := range exp {
		if i >= len(got) || got[i] != exp[i] {
			bad++
			t.Logf("%s, C says %s", exp[i], got[min(i, len(got)-1)])
		}
	}
	if bad > 0 {
		t.Errorf("%d of %d differ", bad, len(exp))
	}
}

func TestAppendOrder(t *testing.T) {
	d := &Dict{}
	for _, name := range []string{"id", "return", "error", "minor", "micro"} {
		d.Set(name, int64(1))
	}
	d.Set("return", List{Null{}, true, uint64(math.MaxUint64), 0.5, "s", List{}, &Dict{}})
	const want = `{"micro": 1, "minor": 1, "return": [null, true, 18446744073709551615, 0.5, "s", [], {}], "id": 1, "error": 1}`
	if got := string(Append(nil, d)); got != want {
		t.Errorf("%s\nwant %s", got, want)
	}
	const pretty = "{\n    \"a\": [\n        1,\n        {\n        },\n        [\n        ],\n        \"{,\\\"}\"\n    ]\n}"
	p := &Dict{}
	p.Set("a", List{int64(1), &Dict{}, List{}, `{,"}`})
	if got := string(Indent(nil, Append(nil, p), "\n")); got != pretty {
		t.Errorf("%s\nwant %s", got, pretty)
	}
}

// The map that large objects get must agree with the members at all times.
func TestDictIndex(t *testing.T) {
	d := &Dict{}
	for i := range 100 {
		d.Set(fmt.Sprint(i), int64(i))
	}
	d.Set("50", "x")
	if !d.Del("10") || d.Del("10") || d.Len() != 99 {
		t.Fatal("Del")
	}
	for i := range 100 {
		v, ok := d.Get(fmt.Sprint(i))
		switch {
		case i == 10 && ok, i != 10 && !ok:
			t.Errorf("%d: %v, %v", i, v, ok)
		case i == 50 && v != "x", i != 10 && i != 50 && v != int64(i):
			t.Errorf("%d: %v", i, v)
		}
	}
	for i := range 90 {
		d.Del(fmt.Sprint(i))
	}
	d.Set("new", true)
	if v, _ := d.Get("new"); d.Len() != 11 || v != true {
		t.Errorf("%d members, new is %v", d.Len(), v)
	}
}

// all feeds s in pieces and notes everything that comes out.
func all(s string, piece int, lim Limits) string {
	p := NewParser(lim)
	var out []byte
	for len(s) > 0 {
		n := min(piece, len(s))
		p.Feed([]byte(s[:n]))
		s = s[n:]
		for {
			v, err, ok := p.Next()
			if !ok {
				break
			}
			if err != nil {
				out = append(out, "! "+err.Error()...)
			} else {
				out = Append(out, v)
			}
			out = append(out, '\n')
		}
	}
	return string(out)
}

func TestLimits(t *testing.T) {
	lim := Limits{TokenBytes: 10, Tokens: 5, Depth: 3}
	for in, want := range map[string]string{
		`"12345678"`:        "! JSON token size limit exceeded\n", // one more than the token alone
		`"1234567"`:         "\"1234567\"\n",
		`["12345678"`:       "! JSON token size limit exceeded\n",
		`["12", "34"`:       "! JSON token size limit exceeded\n",
		`"123456789"[]`:     "! JSON token size limit exceeded\n[]\n",
		`[1,2,3 `:           "! JSON token count limit exceeded\n",
		`[1,2]`:             "[1, 2]\n",
		`[[[]]]`:            "! JSON token count limit exceeded\n",
		`[{"":[[`:           "! JSON token count limit exceeded\n",
		`[[[[`:              "! JSON nesting depth limit exceeded\n",
		`xxxxxxxxxxxx `:     "! JSON token size limit exceeded\n! JSON parse error, invalid keyword 'x'\n",
		`11111111111111111`: "! JSON token size limit exceeded\n",
	} {
		for _, piece := range []int{1, 2, 100} {
			if got := all(in, piece, lim); got != want {
				t.Errorf("%s in pieces of %d:\n%swant\n%s", in, piece, got, want)
			}
		}
	}
}

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		`{"driver": "file", 'x': [1]}`: `{"x": [1], "driver": "file"}`,
		" 12":                          "12",
		"true":                         "true",
		"1.5":                          "1.5",
		"":                             "! Expecting a JSON value",
		"  ":                           "! Expecting a JSON value",
		"1 2":                          "! Expecting at most one JSON value",
		"{} x":                         "! Expecting at most one JSON value",
		"x {}":                         "! JSON parse error, invalid keyword 'x'",
		"{":                            "! JSON parse error, premature EOI",
		`{"a"`:                         "! JSON parse error, premature EOI",
		`{"a":`:                        "! JSON parse error, premature EOI",
		`["a"`:                         "! JSON parse error, premature EOI",
		`["a`:                          `! JSON parse error, stray '"a'`,
		`-`:                            `! JSON parse error, stray '-'`,
		`1e`:                           `! JSON parse error, stray '1e'`,
	} {
		got := ""
		if v, err := Parse(in); err != nil {
			got = "! " + err.Error()
		} else {
			got = string(Append(nil, v))
		}
		if got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

// FuzzParser checks that how the input is cut changes nothing, that what was printed is read
// back as the same, and that nothing is kept behind a resynchronizing byte.
func FuzzParser(f *testing.F) {
	for _, s := range []string{`{"execute":"x","id":[1,-2.5e3,"\u00e9",null,true]}`, `'\''{]}`, "\x1b[[[", `"é` + "\xff", "{} [] 1 01 ", `[1,,2]`, "\xc0\x80\""} {
		f.Add(s, uint8(3))
	}
	lim := Limits{TokenBytes: 100, Tokens: 50, Depth: 10}
	f.Fuzz(func(t *testing.T, s string, piece uint8) {
		whole := all(s, len(s)+1, lim)
		if cut := all(s, int(piece)+1, lim); cut != whole {
			t.Fatalf("in pieces of %d:\n%s\nwhole:\n%s", int(piece)+1, cut, whole)
		}
		p := NewParser(lim)
		p.Feed([]byte(s + "\x1b\n"))
		for {
			v, err, ok := p.Next()
			if !ok {
				break
			}
			if err != nil {
				continue
			}
			text := Append(nil, v)
			back, err := Parse(string(text))
			if err != nil {
				if strings.Contains(string(text), "inf") {
					continue // the one thing that is printed but not read
				}
				t.Fatalf("%s does not parse: %v", text, err)
			}
			if again := Append(nil, back); string(again) != string(text) && !strings.Contains(string(text), "-0") {
				t.Fatalf("%s comes back as %s", text, again)
			}
			Indent(nil, text, "\n")
		}
		if len(p.toks) != 0 || p.state != inStart && p.state != inRecovery || len(p.text) != 0 || cap(p.text) > 4096 {
			t.Fatalf("kept: state %d, %d tokens, %d bytes", p.state, len(p.toks), cap(p.text))
		}
	})
}

func BenchmarkParse(b *testing.B) {
	p := NewParser(Limits{})
	in := []byte(`{"execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "disk0", "file": {"driver": "file", "filename": "/var/lib/images/disk0.qcow2"}}, "id": "libvirt-123"}`)
	b.ReportAllocs()
	b.SetBytes(int64(len(in)))
	for b.Loop() {
		p.Feed(in)
		for _, _, ok := p.Next(); ok; _, _, ok = p.Next() {
		}
	}
}
