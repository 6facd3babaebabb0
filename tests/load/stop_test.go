package load

import (
	"encoding/binary"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// phases are how far clients of a server get before they fall silent, or go: halfOpen, and what
// comes after it. Names are as long as they may be, and longer; lengths are not what follows.
func phases() []string {
	option := func(opt, length uint32, data string) string {
		b := binary.BigEndian.AppendUint32([]byte("IHAVEOPT"), opt)
		return string(binary.BigEndian.AppendUint32(b, length)) + data
	}
	name := func(s string) string {
		return string(binary.BigEndian.AppendUint32(nil, uint32(len(s)))) + s + "\x00\x00"
	}
	const flags = "\x00\x00\x00\x03"
	long := strings.Repeat("x", 4096)
	info := func(s string) string { return option(6, uint32(len(name(s))), name(s)) }
	request := "\x25\x60\x95\x13\x00\x00\x00\x00" + strings.Repeat("\x00", 18) + "\x00\x01"
	return append([]string{
		flags + option(3, 0, ""),                      // list, and no reading
		flags + strings.Repeat(option(3, 0, ""), 200), // that many times
		flags + info("e"),                             // what is there
		// CVE-2020-10761: a name of 4096 bytes that is not there
		flags + info(long),
		flags + info(long+"x"),                                                        // longer than names may be
		flags + option(6, 6, "\xff\xff\xff\xff\x00\x00"),                              // a name longer than its option
		flags + option(7, 1<<31, "much"),                                              // an option of 2 GiB
		flags + option(1, 1, "e"),                                                     // transmission
		flags + option(1, 1, "e") + request,                                           // a read whose reply nobody takes
		flags + option(1, 1, "e") + request[:10],                                      // half a request
		flags + option(1, 1, "e") + strings.Repeat(request, 1000),                     // many
		flags + option(1, 1, "e") + strings.Repeat("\xff", 28),                        // no request
		flags + option(8, 0, "") + option(10, 9, "\x00\x00\x00\x01e\xff\xff\xff\xff"), // four billion contexts
		flags + option(2, 0, ""),                                                      // abort
		"\xff\xff\xff\xff",                                                            // flags nobody knows
	}, halfOpen...)
}

// TestCVE_2024_7409: the NBD server is stopped and started while clients connect, negotiate and
// work, and fall silent at any point of that. It stops in bounded time each time, nothing of the
// clients is left, and the daemon goes on.
func TestCVE_2024_7409(t *testing.T) {
	const rounds, clients = 25, 12
	d := start(t)
	q := d.Dial(t)
	fds := d.FDs(t)
	script := phases()
	var over atomic.Bool
	var wait sync.WaitGroup
	var began, served atomic.Int64
	for i := range clients {
		wait.Go(func() {
			for n := i; !over.Load(); n++ {
				c, err := net.DialTimeout("unix", d.NBDSocket(), time.Second)
				if err != nil {
					time.Sleep(time.Millisecond) // between stop and start nobody listens
					continue
				}
				began.Add(1)
				_ = c.SetDeadline(time.Now().Add(time.Duration(n%7) * 20 * time.Millisecond))
				if n%3 > 0 {
					if _, err := io.ReadFull(c, make([]byte, 18)); err == nil {
						served.Add(1)
					}
				}
				_, _ = io.WriteString(c, script[n%len(script)])
				_, _ = io.Copy(io.Discard, c) // until the deadline, or until the server hangs up
				c.Close()
			}
		})
	}
	for i := range rounds {
		stopped := time.Now()
		q.Must(t, "nbd-server-stop", nil)
		if took := time.Since(stopped); took > 5*time.Second {
			t.Errorf("round %d: the server stopped after %v", i, took)
		}
		eventually(t, "connections are closed", func() bool { return d.FDs(t) < fds })
		addr := map[string]any{"type": "unix", "data": map[string]any{"path": d.NBDSocket()}}
		q.Must(t, "nbd-server-start", map[string]any{"addr": addr, "max-connections": []int{0, 2, 100}[i%3]})
		q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "e", "node-name": "n", "name": "e"})
		end, now := time.Now().Add(10*time.Second), began.Load()
		for ; began.Load() < now+2*clients; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatal("nobody connects any more")
			}
		}
	}
	over.Store(true)
	wait.Wait()
	eventually(t, "nothing is left", func() bool { return d.FDs(t) == fds })
	c, err := daemon.DialNBD(d.NBDSocket(), "e")
	if err == nil {
		err = c.ReadAt(make([]byte, 512), 0)
		c.Close()
	}
	if err != nil {
		t.Errorf("a client that means it: %v", err)
	}
	if served.Load() == 0 {
		t.Error("nobody was greeted")
	}
	t.Logf("%d connections, %d of them greeted, %d stops", began.Load(), served.Load(), rounds)
	d.Stop(t)
	if log := d.Stderr.String(); strings.Contains(log, "panic") {
		t.Error(log)
	}
}
