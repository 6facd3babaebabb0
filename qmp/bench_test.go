package qmp

import (
	"bytes"
	"io"
	"testing"
)

// BenchmarkRoundTrip sends one command and waits for its reply.
func BenchmarkRoundTrip(b *testing.B) {
	c := serve(b, NewMonitor(testDispatcher(), nil, Options{}))
	c.negotiate()
	request := []byte(`{"execute": "query-jobs", "id": 1}` + "\n")
	buf := make([]byte, 4096)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.conn.Write(request); err != nil {
			b.Fatal(err)
		}
		if _, err := c.conn.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkPipelined sends commands in batches of a thousand.
func BenchmarkPipelined(b *testing.B) {
	c := serve(b, NewMonitor(testDispatcher(), nil, Options{}))
	c.negotiate()
	_ = c.conn.SetReadDeadline(noDeadline)
	const batch = 1000
	requests := bytes.Repeat([]byte(`{"execute": "query-jobs", "id": 1}`+"\n"), batch)
	replies := make([]byte, batch*len("{\"return\": [], \"id\": 1}\r\n"))
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		if n%batch != 0 {
			continue
		}
		go func() { _, _ = c.conn.Write(requests) }()
		if _, err := io.ReadFull(c.conn, replies); err != nil {
			b.Fatal(err)
		}
	}
}
