package types

import (
	"errors"
	"strings"
	"testing"

	"qblockd/schema/value"
)

// keyvalDict makes the value that a KEY=VALUE list with dotted keys stands for.
func keyvalDict(t *testing.T, s string) *value.Dict {
	t.Helper()
	root := &value.Dict{}
	for _, kv := range strings.Split(s, ",") {
		key, val, _ := strings.Cut(kv, "=")
		d, parts := root, strings.Split(key, ".")
		for _, p := range parts[:len(parts)-1] {
			sub, ok := d.Get(p)
			if !ok {
				sub = &value.Dict{}
				d.Set(p, sub)
			}
			d = sub.(*value.Dict)
		}
		d.Set(parts[len(parts)-1], val)
	}
	return root
}

func message(err error) string {
	if err == nil {
		return ""
	}
	var e *ArgError
	if !errors.As(err, &e) || e.QMPClass() != "GenericError" {
		return "not an ArgError: " + err.Error()
	}
	return err.Error()
}

// TestKeyval compares with what QEMU said to options on its command line.
func TestKeyval(t *testing.T) {
	for _, c := range []struct{ options, want string }{
		{"driver=null-co,node-name=n,size=1M", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,size=010,latency-ns=x", "Parameter 'latency-ns' expects integer"},
		{"driver=null-co,node-name=n,size=0x", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,read-zeroes=maybe", "Parameter 'read-zeroes' expects 'on' or 'off'"},
		{"driver=null-co,node-name=n,size.a=1", "Parameters 'size.*' are unexpected"},
		{"driver=null-co,node-name=n,cache=on", "Invalid parameter type for 'cache', expected: object"},
		{"driver=null-co,node-name=n,cache.direct=1", "Parameter 'cache.direct' expects 'on' or 'off'"},
		{"driver=null-co,node-name=n,cache.foo=1", "Parameter 'cache.foo' is unexpected"},
		{"driver=raw,node-name=n,file.driver=file", "Parameter 'file.filename' is missing"},
		{"driver=null-co,node-name=n,size= 7", ""},
		{"driver=null-co,node-name=n,size=7 ", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,latency-ns=-18446744073709551615", ""},
		{"driver=null-co,node-name=n,latency-ns=-18446744073709551616", "Parameter 'latency-ns' expects integer"},
		{"driver=null-co,node-name=n,size=9223372036854775808", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,size=", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,size=+5", ""},
		{"driver=null-co,node-name=n,size=+-5", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,size=08", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,size=0b1", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,size=1_0", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,size=0x-1", "Parameter 'size' expects integer"},
		{"driver=null-co,node-name=n,bar=1,foo=2", "Parameter 'bar' is unexpected"},
		{"driver=nope,node-name=n", "Parameter 'driver' does not accept value 'nope'"},
		{"driver=qcow2,file=5,node-name=n,overlap-check=zz", "Parameter 'overlap-check' does not accept value 'zz'"},
		{"driver=null-co,read-only=y,force-share=n,latency-ns=-9223372036854775809", ""},
	} {
		_, err := DecodeBlockdevOptions(keyvalDict(t, c.options), ModeKeyval)
		if got := message(err); got != c.want {
			t.Errorf("%s\n got  %s\n want %s", c.options, got, c.want)
		}
	}
	for _, c := range []struct{ options, want string }{
		{"addr.type=inet,addr.host=h,addr.port=1,addr.to=70000", "Parameter 'to' expects uint16_t"},
		{"addr.type=unix,addr.path=x,max-connections=-1", "Parameter 'max-connections' expects uint32_t"},
		{"addr.type=unix,addr.path=x,max-connections=4294967295", ""},
		{"addr.type=unix", "Parameter 'addr.path' is missing"},
		{"addr=x", "Invalid parameter type for 'addr', expected: object"},
	} {
		_, err := DecodeNbdServerOptions(keyvalDict(t, c.options), ModeKeyval)
		if got := message(err); got != c.want {
			t.Errorf("%s\n got  %s\n want %s", c.options, got, c.want)
		}
	}
}

// TestKeyvalValues checks what scalars on the command line mean.
func TestKeyvalValues(t *testing.T) {
	o, err := DecodeBlockdevOptions(keyvalDict(t, "driver=null-co,read-only=y,size=0x10,latency-ns=-18446744073709551615"), ModeKeyval)
	if err != nil {
		t.Fatal(err)
	}
	u := o.U.(*BlockdevOptionsNull)
	if o.Driver != BlockdevDriverNullCo || !*o.ReadOnly || *u.Size != 16 || *u.LatencyNs != 1 || u.ReadZeroes != nil {
		t.Errorf("got %s", o.AppendJSON(nil))
	}
	for s, want := range map[string]uint64{
		"0": 0, "12345": 12345, "5B": 5, "1k": 1024, "2M": 2 << 20, "1.5G": 3 << 29, ".5k": 512, "1.k": 1024,
		"0x10": 16, "0x1b": 27, "08": 8, " 7": 7, "+5": 5, "16383P": 16383 << 50, "7e": 7 << 60, "1.0": 1,
		"0.0005k": 1, "0.0004k": 0,
	} {
		if got, ok := ParseSize(s); !ok || got != want {
			t.Errorf("size %q: got %d, %v, want %d", s, got, ok, want)
		}
	}
	for _, s := range []string{"", "k", ".", "-1", "1.5", "0x10M", "0x", "1e3", "1kk", "1 ", "16E", "18446744073709551616", "inf", "1_0", "1.2.3"} {
		if got, ok := ParseSize(s); ok {
			t.Errorf("size %q was accepted as %d", s, got)
		}
	}
}

// TestNames checks the paths that errors name inside lists, which no recorded answer has.
func TestListPaths(t *testing.T) {
	v, err := value.Parse(`{"enable": ["oob", 5]}`)
	if err != nil {
		t.Fatal(err)
	}
	_, err = DecodeQmpCapabilitiesArgs(v.(*value.Dict))
	if got := message(err); got != "Invalid parameter type for 'enable[1]', expected: string" {
		t.Error(got)
	}
	d := &value.Dict{}
	d.Set("enable", value.List{"x"})
	_, err = DecodeQmpCapabilitiesArgs(d)
	if got := message(err); got != "Parameter 'null' does not accept value 'x'" {
		t.Error(got)
	}
	for text, want := range map[string]string{
		`{"": 1}`: "Parameter '' is unexpected",
		`{"driver": "null-co", "cache": {"": 1}}`: "Parameter 'cache.' is unexpected",
	} {
		v, err := value.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		decode := func() error { _, err := DecodeBlockdevOptions(v, ModeQObject); return err }
		if text == `{"": 1}` {
			decode = func() error { _, err := DecodeQmpCapabilitiesArgs(v.(*value.Dict)); return err }
		}
		if got := message(decode()); got != want {
			t.Errorf("%s: %s", text, got)
		}
	}
	if a, err := DecodeQmpCapabilitiesArgs(nil); err != nil || a.Enable != nil {
		t.Errorf("no arguments: %v, %v", a, err)
	}
	if _, err := DecodeBlockdevOptions("x", ModeQObject); message(err) != "Invalid parameter type for '<anonymous>', expected: object" {
		t.Error(err)
	}
}

// FuzzRoundTrip encodes what was decoded: decoding that again gives the same bytes, with
// members in hash order.
func FuzzRoundTrip(f *testing.F) {
	for _, s := range []string{
		`{"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "f", "aio": "native"}, "backing": null}`,
		`{"driver": "qcow2", "file": "f", "overlap-check": {"template": "all", "main-header": false}, "cache": {}}`,
		`{"driver": "null-co", "size": 3, "latency-ns": -1}`,
		`{"driver": "raw", "file": {"driver": "host_device", "filename": "\u0000\ud83d\ude00"}, "offset": -9223372036854775808}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		v, err := value.Parse(text)
		if err != nil {
			return
		}
		o, err := DecodeBlockdevOptions(v, ModeQObject)
		if err != nil {
			return
		}
		once := string(o.AppendJSON(nil))
		again, err := value.Parse(once)
		if err != nil {
			t.Fatalf("%s: %v", once, err)
		}
		checkOrder(t, again)
		o, err = DecodeBlockdevOptions(again, ModeQObject)
		if err != nil {
			t.Fatalf("%s: %v", once, err)
		}
		if twice := string(o.AppendJSON(nil)); twice != once {
			t.Errorf("got %s\nthen %s", once, twice)
		}
	})
}

func checkOrder(t *testing.T, v value.Value) {
	t.Helper()
	switch v := v.(type) {
	case value.List:
		for _, e := range v {
			checkOrder(t, e)
		}
	case *value.Dict:
		last := uint32(0)
		for _, m := range v.Members() {
			if b := value.Bucket(m.Name); b < last {
				t.Errorf("member %s is out of order in %s", m.Name, value.Append(nil, v))
			} else {
				last = b
			}
			checkOrder(t, m.Value)
		}
	}
}

func BenchmarkDecodeBlockdevAdd(b *testing.B) {
	v, err := value.Parse(`{"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "node-name": "f", "filename": "x.qcow2"}}`)
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := DecodeBlockdevOptions(v, ModeQObject); err != nil {
			b.Fatal(err)
		}
	}
}
