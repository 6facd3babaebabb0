package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"syscall"
	"time"
)

// fd is a blocking descriptor.
type fd int

func (f fd) Read(b []byte) (int, error) {
	for {
		n, err := syscall.Read(int(f), b)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, err
		case n == 0:
			return 0, io.EOF
		default:
			return n, nil
		}
	}
}

func (f fd) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := syscall.Write(int(f), b[done:])
		if err == syscall.EINTR {
			continue
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func dialUnix(path string) (fd, error) {
	s, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	if err := syscall.Connect(s, &syscall.SockaddrUnix{Name: path}); err != nil {
		syscall.Close(s)
		return -1, err
	}
	return fd(s), nil
}

// timeout makes blocked reads of f fail after d with EAGAIN; 0 is never.
func (f fd) timeout(d time.Duration) error {
	tv := syscall.NsecToTimeval(int64(d))
	return syscall.SetsockoptTimeval(int(f), syscall.SOL_SOCKET, syscall.SO_RCVTIMEO, &tv)
}

// monitor is a QMP client after negotiation, used by one goroutine.
type monitor struct {
	fd fd
	r  *bufio.Reader
}

func dialMonitor(path string) (*monitor, error) {
	s, err := dialUnix(path)
	if err != nil {
		return nil, err
	}
	m := &monitor{s, bufio.NewReaderSize(s, 1<<20)}
	err = s.timeout(5 * time.Second)
	if err == nil {
		_, err = m.line()
	}
	if err == nil {
		_, err = m.do("qmp_capabilities", nil)
	}
	if err == nil {
		err = s.timeout(0)
	}
	if err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *monitor) close() { syscall.Close(int(m.fd)) }

// line returns the next message, to be used before the next call; of one longer than the buffer no
// more than the begin. Events are passed over.
func (m *monitor) line() ([]byte, error) {
	for {
		b, err := m.r.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			b = bytes.Clone(b[:head])
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = m.r.ReadSlice('\n')
			}
		}
		if err != nil {
			return nil, err
		}
		first := b[:min(len(b), head)]
		if len(bytes.TrimSpace(first)) > 0 && !bytes.Contains(first, []byte(`"timestamp"`)) {
			return b, nil
		}
	}
}

// head is how much of a message tells what it is.
const head = 300

// send writes a command and returns its reply.
func (m *monitor) send(command []byte) ([]byte, error) {
	if _, err := m.fd.Write(command); err != nil {
		return nil, err
	}
	b, err := m.line()
	if err != nil {
		return nil, err
	}
	return b, failed(b)
}

// failed makes an error of an error reply.
func failed(reply []byte) error {
	if b := reply[:min(len(reply), head)]; bytes.Contains(b, []byte(`"class"`)) && bytes.Contains(b, []byte(`"error"`)) {
		return fmt.Errorf("%s", bytes.TrimSpace(b))
	}
	return nil
}

// object is a JSON object.
type object map[string]any

// command encodes a command and a newline.
func command(name string, args object) []byte {
	o := object{"execute": name}
	if args != nil {
		o["arguments"] = args
	}
	b, err := json.Marshal(o)
	if err != nil {
		panic(err) // we made it
	}
	return append(b, '\n')
}

func (m *monitor) do(name string, args object) ([]byte, error) { return m.send(command(name, args)) }

// roundTrips sends cmd for d, one after the other, and returns how long each took, in microseconds,
// sorted.
func (m *monitor) roundTrips(cmd []byte, d time.Duration) ([]float64, error) {
	var took []float64
	for begin := time.Now(); ; {
		t := time.Now()
		if _, err := m.send(cmd); err != nil {
			return nil, err
		}
		e := time.Now()
		took = append(took, e.Sub(t).Seconds()*1e6)
		if e.Sub(begin) > d {
			slices.Sort(took)
			return took, nil
		}
	}
}

// pipelined sends all n copies of cmd without waiting and returns the commands a second.
func (m *monitor) pipelined(cmd []byte, n int) (float64, error) {
	all := bytes.Repeat(cmd, n)
	var wg sync.WaitGroup
	var werr error
	begin := time.Now()
	wg.Go(func() { _, werr = m.fd.Write(all) })
	for range n {
		b, err := m.line()
		if err == nil {
			err = failed(b)
		}
		if err != nil {
			return 0, err // the writer ends with the connection
		}
	}
	took := time.Since(begin).Seconds()
	wg.Wait()
	return float64(n) / took, werr
}

// sequence sends the commands one after the other and returns the mean time of one, in
// microseconds.
func (m *monitor) sequence(cmds [][]byte) (float64, error) {
	begin := time.Now()
	for _, c := range cmds {
		if _, err := m.send(c); err != nil {
			return 0, err
		}
	}
	return time.Since(begin).Seconds() * 1e6 / float64(len(cmds)), nil
}
