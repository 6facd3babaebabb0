package qmp

import (
	"net"
	"path/filepath"
	"testing"
)

// Something that comes from the client at the moment when nobody looks for its leaving any more
// does not end its connection.
func TestStopWaitBesideInput(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	c := NewConn(server)
	h := c.(HangupWaiter)
	b := make([]byte, 1)
	for i := range 20000 {
		waited := make(chan bool)
		go func() { waited <- h.WaitHangup() }()
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			if _, err := client.Write([]byte{1}); err != nil {
				t.Error(err)
			}
		}()
		h.StopWait()
		if <-waited {
			t.Fatal("it seems to have gone")
		}
		<-sent
		if _, err := c.Read(b); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
}
