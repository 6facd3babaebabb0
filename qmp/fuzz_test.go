package qmp

import (
	"context"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"qblockd/events"
	"qblockd/schema/value"
)

// FuzzSession sends a client's bytes to a session, whole or in pieces: it answers each of its
// requests with one line of JSON, ends when its client does, and takes memory in proportion to what
// was sent and answered. The number is how many bytes are written at a time; 0: all.
func FuzzSession(f *testing.F) {
	const hello = `{"execute":"qmp_capabilities"}`
	for _, s := range []string{
		"", hello, hello + `{"execute":"echo","arguments":{"a":[1,2.5,"\u00e9"]},"id":{"b":1,"a":2}}`,
		`{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}{"exec-oob":"oob","id":1}{"execute":"echo"}{"exec-oob":"echo"}`,
		hello + `{"execute":1}{"execute":"echo","x":1}[]"s" 1 {"arguments":{}}{"exec-oob":"echo"}`,
		hello + "{\"execute\":\"ec\xff{\"execute\":\"query-jobs\"}\n\x1b[[[{}", hello + strings.Repeat("[", 40),
		hello + `{"execute":"quit"}{"execute":"echo"}`, "'\x00'}]}{'a' 1}\r\n\t" + hello,
	} {
		f.Add([]byte(s), uint8(0))
		f.Add([]byte(s), uint8(1))
	}
	f.Fuzz(func(t *testing.T, in []byte, piece uint8) {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		d := testDispatcher()
		d.HandleOOB("oob", d.commands["echo"].run)
		m := NewMonitor(d, events.NewBus(events.Options{}), Options{Limits: Limits{
			Input: value.Limits{TokenBytes: 4096, Tokens: 1000, Depth: 20},
		}})
		delete(d.commands, "quit")
		d.Handle("quit", func(ctx context.Context, _ *value.Dict, out []byte) ([]byte, error) {
			d.Stop()
			AfterReply(ctx, func() { go m.Close(time.Second) }) // as the daemon does
			return out, nil
		})
		c, s := socketPair(t)
		done := make(chan struct{})
		go func() {
			m.Serve(s)
			close(done)
		}()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		go sendPieces(c, in, int(piece))
		out, err := io.ReadAll(c)
		if err != nil && isTimeout(err) {
			t.Fatal("the session neither answers nor ends")
		}
		m.Close(0)
		<-done
		c.Close()
		runtime.ReadMemStats(&after)
		for i, line := range strings.Split(strings.TrimSuffix(string(out), "\r\n"), "\r\n") {
			v, err := value.Parse(line)
			if _, ok := v.(*value.Dict); (err != nil || !ok) && !strings.Contains(line, "inf") {
				t.Fatalf("line %d is %q: %v", i, line, err)
			}
		}
		if used, limit := after.TotalAlloc-before.TotalAlloc, uint64(1<<20+1000*len(in)+20*len(out)); used > limit {
			t.Errorf("%d bytes for %d sent and %d answered", used, len(in), len(out))
		}
	})
}

func isTimeout(err error) bool {
	e, ok := err.(net.Error)
	return ok && e.Timeout()
}

// sendPieces writes b, n bytes at a time, and ends the sending.
func sendPieces(c *net.UnixConn, b []byte, n int) {
	defer c.CloseWrite()
	if n == 0 {
		n = len(b)
	}
	for len(b) > 0 {
		k := min(n, len(b))
		if _, err := c.Write(b[:k]); err != nil {
			return
		}
		b = b[k:]
	}
}
