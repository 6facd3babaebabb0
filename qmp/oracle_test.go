package qmp

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// The peer; a variable so that a build of another version can be tried.
var oracle = func() string {
	if p := os.Getenv("QBLOCKD_ORACLE"); p != "" {
		return p
	}
	return "qemu-storage-daemon"
}()

// wireCases is input behind the negotiation; the replies of both daemons must be equal to
// the byte. Each case is followed by endMark.
var wireCases = map[string]string{
	"ids": `{"execute":"query-jobs","id":1}{"execute":"query-jobs","id":-0}{"execute":"query-jobs","id":1.0}` +
		`{"execute":"query-jobs","id":0.1}{"execute":"query-jobs","id":1e10}{"execute":"query-jobs","id":-1.5e-7}` +
		`{"execute":"query-jobs","id":1e999}{"execute":"query-jobs","id":-1e999}{"execute":"query-jobs","id":-0.0}` +
		`{"execute":"query-jobs","id":5e-324}{"execute":"query-jobs","id":123456789012345678901234567890}` +
		`{"execute":"query-jobs","id":18446744073709551615}{"execute":"query-jobs","id":18446744073709551616}` +
		`{"execute":"query-jobs","id":-9223372036854775808}{"execute":"query-jobs","id":-9223372036854775809}` +
		`{"execute":"query-jobs","id":1e17}{"execute":"query-jobs","id":1e16}{"execute":"query-jobs","id":123456.789e3}` +
		`{"execute":"query-jobs","id":0.0001}{"execute":"query-jobs","id":0.00001}{"execute":"query-jobs","id":null}`,
	"members": `{"execute":"query-jobs","id":{"a":1,"b":2,"c":3,"micro":4,"minor":5,"aa":6,"zz":7,"id":8,"return":9,"error":10,` +
		`"":11,"a much longer name than most of them":12,"Ä":13,"k0":1,"k1":1,"k2":1,"k3":1,"k4":1,"k5":1,"k6":1,"k7":1,"k8":1,"k9":1}}`,
	"colliding members":  collidingIDs(),
	"strings":            `{"execute":"query-jobs","id":"é中☃😀\u00e9\ud83d\ude00\u0000\u001f\u007f\b\f\n\r\t\"\\\/<>&'"}{'execute':'query-jobs','id':'it\'s "quoted"'}` + "{\"execute\":\"query-jobs\",\"id\":\"\xc0\x80\x7f\"}",
	"bad strings":        `["\ud800"]["\udc00"]["\uffff"]["\u12"]["\u12"]["\q"]["\ud800\u0041"]["\ud83f\udffe"]["\ufdd0"]["\u"]["\u00zz"]` + "[\"\xff\"]\n[\"\xc1\x81\"][\"\xed\xa0\x80\"][\"\xf8\x88\x80\x80\x80\"][\"\x80\"][\"\xe4\xb8\"][\"tab\t\"]\n[\"nl\n\"]\n",
	"bad numbers":        "[01]\n[1.]\n[-]\n[1e]\n[1e+]\n[.5]\n[+1]\n[0x1]\n[1.5.5]\n-\n1.\n--1\n1e5x\n[1]0\n-0 7e0 ",
	"keywords":           "true false null nul\nTrue\n[tru e]\n{true:1}\n" + strings.Repeat("x", 1100) + "\n",
	"structure":          `{"a":}` + `[1,]` + `{:1}` + `]` + `}` + `,` + `:` + `{"a" 1}` + `[1 2]` + `{1:2}` + `{[1]:2}` + `{"a":1,"a":2}` + `{"a":1 "b":2}` + `{,}` + `[,]` + `{"a":1,}` + `[}` + `{]` + `[{]}` + `{"a":[}` + `{"a":[}]}` + `{{}}` + `{"a":"b":"c"}` + `{"a":x,"b":y}` + `[[[}]]]`,
	"structure 2":        `{"a":1,"a":}` + `{1:}` + `{x:1}` + `{"\q":1}` + `{"a":"\q","a":1}` + `[x,"\q"]` + `{"a":{"b":{"b":1,"b":2}}}` + `[]` + `{}` + `"s"` + `[[],{}]`,
	"stray":              "\x00\n\xef\xbb\xbf{}\n/* */\n// x\n#\n%d\n(1)\n{\"execute\":\x0b\"query-jobs\"}\n\x7f\nAbc\n=\n;{}\n\x1b\x1b\xff\xfe\n\"abc\xff{}\n'abc\n\"a\\\n\"a\\\xff\n",
	"resync":             "{\"execute\":\"query-jobs\",\"id\":[1,2\xff{\"execute\":\"query-jobs\",\"id\":3}\n{\"a\":\x1b{\"execute\":\"query-jobs\",\"id\":4}\n\tz\t[1]Z\t[2]",
	"checks":             `{"execute":1}{"execute":"query-jobs","arguments":null}{"execute":"query-jobs","arguments":[]}{"arguments":{}}{"x":1}{"execute":"query-jobs","x":1}{"execute":1,"arguments":2,"x":3}{"execute":"nope"}{"execute":""}{"execute":"Query-jobs"}{"exec-oob":"query-jobs"}{"exec-oob":1,"execute":2}{"id":1}{}{"execute":"query-jobs","arguments":{},"id":{}}{"execute":"query-jobs","arguments":{"x":1},"id":5}`,
	"capabilities again": `{"execute":"qmp_capabilities"}{"execute":"qmp_capabilities","arguments":{"x":1}}{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}`,
	"long unexpected":    `{"` + strings.Repeat("m", 300) + `":1}`,
	"nesting": strings.Repeat("[", 1024) + strings.Repeat("]", 1024) + strings.Repeat("[", 1025) + "\n" +
		strings.Repeat(`{"a":`, 1024) + "1" + strings.Repeat("}", 1024),
	"nesting in id":            `{"execute":"query-jobs","id":` + strings.Repeat("[", 1023) + strings.Repeat("]", 1023) + "}",
	"blank":                    "\n\r\t  \n\n",
	"unfinished before resync": `{"execute":"query-jobs","id":"never`,
}

// collidingIDs is a request whose id has many members in few buckets.
func collidingIDs() string {
	var b strings.Builder
	b.WriteString(`{"execute":"query-jobs","id":{`)
	for i := range 300 {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `"m%d":%d`, i, i)
	}
	b.WriteString("}}")
	return b.String()
}

const endMark = "\x1b\n{\"execute\":\"query-jobs\",\"id\":\"the end\"}"

// converse negotiates on conn, sends the input in pieces and returns all that comes behind the
// greeting, up to the reply to endMark.
func converse(conn net.Conn, input string, piece int) ([]byte, error) {
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	all := `{"execute":"qmp_capabilities"}` + input + endMark
	sent := make(chan error, 1)
	go func() {
		for len(all) > 0 {
			n := min(piece, len(all))
			if _, err := io.WriteString(conn, all[:n]); err != nil {
				sent <- err
				return
			}
			all = all[n:]
		}
		sent <- nil
	}()
	var got []byte
	buf := make([]byte, 64<<10)
	for {
		n, err := conn.Read(buf)
		got = append(got, buf[:n]...)
		if bytes.HasSuffix(got, []byte(`"the end"}`+"\r\n")) || bytes.HasSuffix(got, []byte(`"the end"`+"\r\n}\r\n")) {
			break
		}
		if err != nil {
			return got, err
		}
	}
	if err := <-sent; err != nil {
		return got, err
	}
	// The greeting ends with the line, or with the brace in column 0 of pretty output.
	if bytes.HasPrefix(got, []byte("{\r\n")) {
		_, got, _ = bytes.Cut(got, []byte("\r\n}\r\n"))
	} else {
		_, got, _ = bytes.Cut(got, []byte("\r\n"))
	}
	return got, nil
}

// askOracle converses with a reference daemon of its own. It is known to hang at the start once
// in a few hundred times; then it is tried again.
func askOracle(t *testing.T, input string, pretty bool) []byte {
	t.Helper()
	for range 3 {
		c, s := socketPair(t)
		f, err := s.File()
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		args := []string{"--chardev", "socket,id=m,fd=3", "--monitor", "chardev=m"}
		if pretty {
			args[3] += ",pretty=on"
		}
		cmd := exec.Command(oracle, args...)
		cmd.ExtraFiles = []*os.File{f}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		f.Close()
		got, err := converse(c, input, 1<<20)
		c.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err == nil {
			return got
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("reference: %v after %q", err, got)
		}
	}
	t.Fatal("QEMU hangs")
	return nil
}

func askOurs(t *testing.T, input string, pretty bool, piece int) []byte {
	t.Helper()
	c := serve(t, NewMonitor(testDispatcher(), nil, Options{Pretty: pretty}))
	got, err := converse(c.conn, input, piece)
	if err != nil {
		t.Fatalf("%v after %q", err, got)
	}
	return got
}

// TestAgainstReference compares the bytes that both daemons send.
func TestAgainstReference(t *testing.T) {
	if _, err := exec.LookPath(oracle); err != nil {
		t.Skipf("SKIPPED: the wire is not compared with QEMU: %v", err)
	}
	for name, input := range wireCases {
		for _, pretty := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/pretty=%v", name, pretty), func(t *testing.T) {
				want := askOracle(t, input, pretty)
				compare(t, "whole", askOurs(t, input, pretty, 1<<20), want)
			})
		}
	}
}

// TestSegmentation sends each case in pieces of several sizes: nothing may change.
func TestSegmentation(t *testing.T) {
	for name, input := range wireCases {
		want := askOurs(t, input, false, 1<<20)
		for _, piece := range []int{1, 2, 3, 7, 100} {
			if len(input)/piece > 3000 {
				continue
			}
			compare(t, fmt.Sprintf("%s in pieces of %d", name, piece), askOurs(t, input, false, piece), want)
		}
	}
}

func compare(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	g, w := strings.SplitAfter(string(got), "\r\n"), strings.SplitAfter(string(want), "\r\n")
	for i := range max(len(g), len(w)) {
		if i >= len(g) || i >= len(w) || g[i] != w[i] {
			t.Fatalf("%s: line %d of %d/%d\ngot  %.600q\nwant %.600q", what, i, len(g), len(w), g[min(i, len(g)-1)], w[min(i, len(w)-1)])
		}
	}
}
