package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/cmd/version"
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

// monitor answers like a daemon, with events on the way: "boom" is refused, "vanish" ends the
// connection.
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
			ID        int64
			Execute   string
			Arguments json.RawMessage
		}
		if json.Unmarshal(in.Bytes(), &r) != nil {
			return
		}
		switch r.Execute {
		case "qmp_capabilities":
			fmt.Fprintf(conn, `{"return": {}, "id": %d}`+"\r\n"+
				`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "ONE", "data": {"id": "x"}}`+"\r\n"+
				`{"timestamp": {"seconds": 1, "microseconds": 3}, "event": "TWO"}`+"\r\n", r.ID)
		case "boom":
			fmt.Fprintf(conn, `{"error": {"class": "DeviceNotFound", "desc": "gone"}, "id": %d}`, r.ID)
		case "vanish":
			return
		default:
			fmt.Fprintf(conn, `{"return": {"did": "%s", "with": [%s]}, "id": %d}`, r.Execute, r.Arguments, r.ID)
		}
	}
}

func TestCommand(t *testing.T) {
	sock := monitor(t)
	var out bytes.Buffer
	if err := run(t.Context(), []string{"-s", sock, "do", "a.b=1"}, "", &out); err != nil {
		t.Fatal(err)
	}
	if want := "{\n  \"did\": \"do\",\n  \"with\": [\n    {\n      \"a\": {\n        \"b\": 1\n      }\n    }\n  ]\n}\n"; out.String() != want {
		t.Errorf("printed %s", out.String())
	}
	var refused *replyError
	if err := run(t.Context(), []string{"boom"}, sock, &out); !errors.As(err, &refused) || err.Error() != "gone (DeviceNotFound)" {
		t.Errorf("refusal: %v", err)
	}
	if err := run(t.Context(), []string{"vanish"}, sock, &out); err == nil || errors.Is(err, errUsage) {
		t.Errorf("no answer: %v", err)
	}
	if err := run(t.Context(), []string{"-s", sock + "-not", "do"}, "", &out); err == nil {
		t.Error("connected to nothing")
	}
	for _, bad := range [][]string{nil, {"-x"}, {"do", "word"}, {"-s", sock, "events", "-x"}, {"graph", "word"},
		{"graph", "-f", "png"}, {"graph", "-o", "x.png"},
		{"jobs", "word"}, {"completion"}, {"completion", "ksh"}, {"events", "-n", "-1"}} {
		if err := run(t.Context(), bad, sock, &out); !errors.Is(err, errUsage) {
			t.Errorf("%q: %v, want a usage error", bad, err)
		}
	}
}

// TestNotQMP connects to a server of another kind: the error says what is wrong with the socket.
func TestNotQMP(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "nbd.sock")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = c.Write([]byte("NBDMAGICIHAVEOPT\x00\x03"))
			_, _ = io.Copy(io.Discard, c)
			c.Close()
		}
	}()
	if err := run(t.Context(), []string{"query-jobs"}, sock, io.Discard); err == nil || !strings.Contains(err.Error(), "nbd.sock does not greet as a QMP monitor does") {
		t.Errorf("%v", err)
	}
}

func TestHelp(t *testing.T) {
	var out bytes.Buffer
	for _, words := range []string{"help", "--help", "help events", "events --help", "help block-stream", "help blockdev-add driver=raw file.driver=file file."} {
		out.Reset()
		// Nobody serves: the schema that is built in does.
		if err := run(t.Context(), strings.Fields(words), filepath.Join(t.TempDir(), "not"), &out); err != nil || out.Len() < 200 {
			t.Errorf("%s: %v, %s", words, err, out.String())
		}
	}
	for _, want := range []string{"  file.filename: string\n", "  file.aio (optional): "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("lacks %q: %s", want, out.String())
		}
	}
	out.Reset()
	if err := run(t.Context(), []string{"help", "blockdev-add"}, "", &out); err != nil || !strings.Contains(out.String(), "More depends on driver") {
		t.Errorf("%v %s", err, out.String())
	}
	if err := run(t.Context(), []string{"help", "no-such"}, "", &out); err == nil {
		t.Error("helps with what is not there")
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		out.Reset()
		if err := run(t.Context(), []string{"completion", shell}, "", &out); err != nil || !strings.Contains(out.String(), "qblockctl") {
			t.Errorf("%s: %v", shell, err)
		}
	}
}

// TestHelpGoesOn: what help says shows more can be pasted, and does.
func TestHelpGoesOn(t *testing.T) {
	for _, c := range []struct{ words, says, shows string }{
		{"help nbd-server-start", "'help nbd-server-start addr.' shows it", "addr.type: inet|unix|fd"},
		{"help nbd-server-start addr.", "'help nbd-server-start addr.type=... addr.' shows it", ""},
		{"help nbd-server-start addr.type=unix addr.", "'help nbd-server-start addr.type=unix addr.data.' shows it", "addr.data.path: string"},
		{"help blockdev-create job-id=c options.", "'help blockdev-create job-id=c options.driver=... options.' shows it", ""},
		{"help blockdev-create options.driver=luks options.", "", "options.size: integer"},
		{"help blockdev-add", "'help blockdev-add driver=...' shows it", ""},
	} {
		var out bytes.Buffer
		err := run(t.Context(), strings.Fields(c.words), filepath.Join(t.TempDir(), "not"), &out)
		if err != nil || !strings.Contains(out.String(), c.says) {
			t.Errorf("%s: %v, lacks %q: %s", c.words, err, c.says, out.String())
		}
		_, pasted, _ := strings.Cut(c.says, "'")
		if pasted, _, _ = strings.Cut(pasted, "'"); pasted == "" || strings.Contains(pasted, "...") {
			pasted = c.words
		}
		out.Reset()
		err = run(t.Context(), strings.Fields(pasted), filepath.Join(t.TempDir(), "not"), &out)
		if err != nil || !strings.Contains(out.String(), c.shows) {
			t.Errorf("%s: %v, lacks %q: %s", pasted, err, c.shows, out.String())
		}
	}
}

func TestVersion(t *testing.T) {
	for _, flag := range []string{"--version", "-V"} {
		var out bytes.Buffer
		if err := run(t.Context(), []string{flag}, "", &out); err != nil || !strings.HasPrefix(out.String(), "qblockctl version "+version.Version) {
			t.Errorf("%s: %v, %q", flag, err, out.String())
		}
	}
}

// TestNoSuchEvent: an event that the daemon does not have is not waited for.
func TestNoSuchEvent(t *testing.T) {
	err := run(t.Context(), []string{"events", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_DONE"}, monitor(t), io.Discard)
	if err == nil || !strings.Contains(err.Error(), "the daemon has no event 'BLOCK_JOB_DONE'; it has\n  BLOCK_EXPORT_DELETED ") {
		t.Error(err)
	}
}

func TestHint(t *testing.T) {
	if h := hint(&replyError{"GenericError", "Invalid parameter type for 'file.filename', expected: string"}); !strings.Contains(h, `'file.filename="12"'`) {
		t.Errorf("hint %q", h)
	}
	for desc, want := range map[string]string{
		"Parameter 'options.size' expects uint64":               "bytes",
		"Invalid parameter type for 'size', expected: integer":  "bytes",
		`Failed to get shared "write" lock`:                     "in use",
		"Could not open 'F': Failed to get \"write\" lock":      "in use",
		"TLS negotiation required before option 7 (go)":         "tls-creds=NAME",
		"Cannot find device='' nor node-name='n'":               "graph",
		"Parameter 'encrypt.key-secret' is required for cipher": "object-add qom-type=secret",
		"NBD server not running":                                "nbd-server-start",
		"Parameter 'job-id' is missing":                         "qblockctl help",
	} {
		if h := hint(fmt.Errorf("wrapped: %w", &replyError{"GenericError", desc})); !strings.Contains(h, want) {
			t.Errorf("%s: hint %q lacks %q", desc, h, want)
		}
	}
	if h := hint(&replyError{"GenericError", "no"}); h != "" {
		t.Errorf("hint %q", h)
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
			fmt.Fprint(conn, `{"event": "EARLY", "timestamp": {"seconds": 1, "microseconds": 2}}`, `{"return": {}, "id": 1}`,
				`{"event": "JOB_STATUS_CHANGE", "data": {"id": "x"}, "timestamp": {"seconds": 1, "microseconds": 3}}`)
			conn.Close()
		}
	}()
	var out bytes.Buffer
	if err := run(t.Context(), []string{"events"}, path, &out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.Contains(s, ".000002 EARLY\n") || !strings.Contains(s, ".000003 JOB_STATUS_CHANGE id=x\n") {
		t.Errorf("printed %s", s)
	}
	out.Reset()
	if err := run(t.Context(), []string{"events", "--json", "JOB_STATUS_CHANGE"}, path, &out); err != nil {
		t.Fatal(err)
	}
	if s := out.String(); !strings.HasPrefix(s, `{"event": "JOB_STATUS_CHANGE"`) || strings.Contains(s, "EARLY") {
		t.Errorf("printed %s", s)
	}
	<-done
}
