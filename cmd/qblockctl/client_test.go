package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseArguments(t *testing.T) {
	for _, c := range []struct{ words, want string }{
		{``, `null`},
		{`node-name=disk flat=true n=12`, `{"flat":true,"n":12,"node-name":"disk"}`},
		{`id="12" size=1G empty=`, `{"empty":"","id":"12","size":"1G"}`},
		{`driver=qcow2 file.driver=file file.filename=a=b.img`, `{"driver":"qcow2","file":{"driver":"file","filename":"a=b.img"}}`},
		{`nodes.1=b nodes.0=a`, `{"nodes":["a","b"]}`},
		{`nodes=["a"]`, `{"nodes":["a"]}`},
		{`x.0.k=1 x.1.k=2`, `{"x":[{"k":1},{"k":2}]}`},
		{`backing=null`, `{"backing":null}`},
		{`{"a":1}`, `{"a":1}`},
	} {
		v, err := parseArguments(strings.Fields(c.words))
		if err != nil {
			t.Errorf("%s: %v", c.words, err)
			continue
		}
		if b, _ := json.Marshal(v); string(b) != c.want {
			t.Errorf("%s: %s, want %s", c.words, b, c.want)
		}
	}
	for _, bad := range []string{`disk`, `=x`, `a.=x`, `a=1 a=2`, `a=1 a.b=2`, `a.b=2 a=1`, `n.0=a n.2=b`, `n.0=a n.x=b`, `{"a"`} {
		if v, err := parseArguments(strings.Fields(bad)); err == nil {
			t.Errorf("%s: accepted as %v", bad, v)
		}
	}
}

// monitor answers like a daemon, with events on the way: "boom" is refused, "vanish" ends the connection.
func monitor(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serve(conn)
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return path
}

func serve(conn net.Conn) {
	defer conn.Close()
	fmt.Fprint(conn, `{"QMP": {"version": {}, "capabilities": []}}`+"\r\n")
	for in := bufio.NewScanner(conn); in.Scan(); {
		var r struct {
			Execute   string
			Arguments json.RawMessage
		}
		if json.Unmarshal(in.Bytes(), &r) != nil {
			return
		}
		switch r.Execute {
		case "qmp_capabilities":
			fmt.Fprint(conn, `{"return": {}}`+"\r\n"+
				`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "ONE", "data": {"id": "x"}}`+"\r\n"+
				`{"timestamp": {"seconds": 1, "microseconds": 3}, "event": "TWO"}`+"\r\n")
		case "boom":
			fmt.Fprint(conn, `{"error": {"class": "DeviceNotFound", "desc": "gone"}}`)
		case "vanish":
			return
		default:
			fmt.Fprintf(conn, `{"return": {"did": "%s", "with": [%s]}}`, r.Execute, r.Arguments)
		}
	}
}

func TestCommand(t *testing.T) {
	sock := monitor(t)
	var out bytes.Buffer
	if err := run([]string{"-s", sock, "do", "a.b=1"}, "", &out); err != nil {
		t.Fatal(err)
	}
	if want := "{\n  \"did\": \"do\",\n  \"with\": [\n    {\n      \"a\": {\n        \"b\": 1\n      }\n    }\n  ]\n}\n"; out.String() != want {
		t.Errorf("printed %s", out.String())
	}
	var refused *replyError
	if err := run([]string{"boom"}, sock, &out); !errors.As(err, &refused) || err.Error() != "gone (DeviceNotFound)" {
		t.Errorf("refusal: %v", err)
	}
	if err := run([]string{"vanish"}, sock, &out); err == nil || errors.Is(err, errUsage) {
		t.Errorf("no answer: %v", err)
	}
	if err := run([]string{"-s", sock + "-not", "do"}, "", &out); err == nil {
		t.Error("connected to nothing")
	}
	for _, bad := range [][]string{nil, {"-x"}, {"do", "word"}, {"-s", sock, "events", "-x"}} {
		if err := run(bad, sock, &out); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v, want a usage error", bad, err)
		}
	}
	out.Reset()
	if err := run([]string{"help"}, "", &out); err != nil || out.String() != usage {
		t.Errorf("help: %v, %s", err, out.String())
	}
}

func TestEvents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 2 {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			in := bufio.NewReader(conn)
			fmt.Fprint(conn, `{"QMP": {}}`)
			in.ReadString('\n') // the client's only line
			fmt.Fprint(conn, `{"event": "EARLY", "timestamp": {"seconds": 1, "microseconds": 2}}`, `{"return": {}}`,
				`{"event": "LATE", "data": {"id": "x"}, "timestamp": {"seconds": 1, "microseconds": 3}}`)
			conn.Close()
		}
	}()
	var out bytes.Buffer
	if err := run([]string{"events"}, path, &out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, ".000002 EARLY\n") || !strings.Contains(s, `.000003 LATE {"id": "x"}`) {
		t.Errorf("printed %s", s)
	}
	out.Reset()
	if err := run([]string{"events", "-json", "LATE"}, path, &out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.HasPrefix(s, `{"event": "LATE"`) || strings.Contains(s, "EARLY") {
		t.Errorf("printed %s", s)
	}
	<-done
}
