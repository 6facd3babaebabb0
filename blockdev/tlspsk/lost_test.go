package tlspsk

import (
	"bytes"
	"io"
	"testing"
	"time"
)

// stuck is a connection whose writes wait until they are let go.
type stuck struct {
	replay
	w       io.Writer
	entered chan struct{}
	release chan struct{}
}

func (c *stuck) Write(b []byte) (int, error) {
	c.entered <- struct{}{}
	<-c.release
	return c.w.Write(b)
}

// TestLostWhileWriting has the peer send what is not authentic while somebody writes: what is left
// of it is not written, and the peer is told.
func TestLostWhileWriting(t *testing.T) {
	client, server := connected(t, clientConfig(), serverConfig())
	var sent bytes.Buffer
	s := &stuck{w: &sent, entered: make(chan struct{}), release: make(chan struct{})}
	s.r = bytes.NewReader(record(recordData, make([]byte, 100)))
	client.nc = s
	wrote := make(chan error, 1)
	go func() {
		_, err := client.Write(make([]byte, 3*batch*maxPlain))
		wrote <- err
	}()
	<-s.entered
	_, err := client.Read(make([]byte, 1))
	if !isLocal(err, BadRecordMAC) {
		t.Fatalf("Read gives %v", err)
	}
	s.release <- struct{}{} // the first batch
	<-s.entered
	s.release <- struct{}{} // the alert
	if werr := <-wrote; werr != err {
		t.Errorf("Write gives %v", werr)
	}
	if _, werr := client.Write([]byte("x")); werr != err {
		t.Errorf("the next gives %v", werr)
	}
	server.nc = &replay{&sent}
	n, err := io.Copy(io.Discard, server)
	if n > batch*maxPlain || err != RemoteError(BadRecordMAC) {
		t.Errorf("the peer gets %d bytes, and then %v", n, err)
	}
	if secret := client.out.secret; !zero(secret) {
		t.Error("a secret is left")
	}
}

// TestNothingAfterTheEnd has an end that has said that nothing more comes get nonsense: it does not
// complain.
func TestNothingAfterTheEnd(t *testing.T) {
	client, server := connected(t, clientConfig(), serverConfig())
	if err := client.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, err := server.nc.Write(record(recordData, make([]byte, 100))); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(make([]byte, 1)); !isLocal(err, BadRecordMAC) {
		t.Errorf("got %v", err)
	}
	client.nc.Close()
	if _, err := server.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("the server gets %v", err)
	}
	if n, err := server.nc.Read(make([]byte, 1)); n != 0 || err == nil {
		t.Errorf("the client has sent more: %v", err)
	}
}

// TestWiped has a direction whose key was wiped: it does not go back to what anybody can read.
func TestWiped(t *testing.T) {
	client, _ := connected(t, clientConfig(), serverConfig())
	client.out.end(io.EOF)
	if client.out.clear() {
		t.Error("a direction whose key was wiped is in the clear")
	}
	client.out.take(0)
	defer func() {
		if recover() == nil {
			t.Errorf("a record was made without a key: %x", client.out.buf.b)
		}
	}()
	client.out.add(recordData, []byte("hello"))
}

// echo is a loop that has deadlines.
type echo struct{ *loop }

func (*echo) SetWriteDeadline(time.Time) error { return nil }

// TestMirror has an end get back what it says.
func TestMirror(t *testing.T) {
	a, b := sockets(t)
	go func() { _, _ = io.Copy(b, b) }()
	if err := Client(a, clientConfig()).Handshake(); !isLocal(err, UnexpectedMessage) {
		t.Errorf("got %v", err)
	}
	// Also after the handshake.
	client, _ := connected(t, clientConfig(), serverConfig())
	l := &loop{}
	client.nc = &echo{loop: l}
	if _, err := client.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(make([]byte, 10)); !isLocal(err, BadRecordMAC) {
		t.Errorf("got %v", err)
	}
}
