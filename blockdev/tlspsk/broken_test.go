package tlspsk

import (
	"bytes"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// broken is a connection whose bytes come in pieces, and of which one is changed, or is the last.
type broken struct {
	net.Conn
	pieces []int // sizes of what Read returns, over and over
	i      int
	flip   int // which byte is changed; negative: none
	cut    int // after which byte nothing comes; negative: none
	at     int
}

func (c *broken) Read(b []byte) (int, error) {
	n := min(len(b), c.pieces[c.i%len(c.pieces)])
	c.i++
	if c.cut >= 0 {
		if n = min(n, c.cut-c.at); n == 0 {
			c.Close()
			return 0, io.EOF
		}
	}
	n, err := c.Conn.Read(b[:n])
	if c.flip >= c.at && c.flip < c.at+n {
		b[c.flip-c.at] ^= 0x10
	}
	c.at += n
	return n, err
}

// TestBroken has bytes come in pieces, changed or not at all: what is read is what was written, as
// far as it comes, and no end is believed that was not told.
func TestBroken(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		a, b := sockets(t)
		defer a.Close()
		defer b.Close()
		draw := func(nc net.Conn, who string) *broken {
			at := rapid.OneOf(rapid.IntRange(0, 700), rapid.IntRange(0, 100_000))
			c := &broken{Conn: nc, flip: -1, cut: -1,
				pieces: rapid.SliceOfN(rapid.OneOf(rapid.IntRange(1, 5), rapid.IntRange(1, 100_000)), 1, 6).Draw(rt, who+" pieces")}
			switch rapid.IntRange(0, 3).Draw(rt, who+" does") {
			case 0:
				c.flip = at.Draw(rt, who+" changes")
			case 1:
				c.cut = at.Draw(rt, who+" ends after")
			}
			return c
		}
		ba, bb := draw(a, "client"), draw(b, "server")
		whole := ba.flip < 0 && ba.cut < 0 && bb.flip < 0 && bb.cut < 0
		client, server := Client(ba, clientConfig()), Server(bb, serverConfig())
		client.maxRecords = uint64(rapid.IntRange(1, 5).Draw(rt, "records of a key"))
		down, up := random(rapid.IntRange(0, 100_000).Draw(rt, "down")), random(rapid.IntRange(0, 100_000).Draw(rt, "up"))
		talkBoth(rt, client, server, up, down, whole)
	})
}

// talkBoth has each end write and read until the end.
func talkBoth(rt *rapid.T, client, server *Conn, up, down []byte, whole bool) {
	var wg sync.WaitGroup
	end := func(c *Conn, write, want []byte, who string) {
		wg.Go(func() {
			// Ends can wait for one another when a length was changed.
			wait := 200 * time.Millisecond
			if whole {
				wait = time.Minute
			}
			_ = c.SetDeadline(time.Now().Add(wait))
			var side sync.WaitGroup
			side.Go(func() {
				if _, err := c.Write(write); err == nil {
					_ = c.CloseWrite()
				}
				// Who was told that more comes than does would wait for it.
				_ = c.nc.(*broken).Conn.(*net.UnixConn).CloseWrite()
			})
			got, err := io.ReadAll(c)
			if err != nil {
				_ = c.nc.Close()
			}
			side.Wait()
			switch {
			case !bytes.HasPrefix(want, got):
				rt.Errorf("%s: got what was not sent", who)
			case err == nil && len(got) < len(want):
				rt.Errorf("%s: %d of %d bytes are taken for all", who, len(got), len(want))
			case whole && err != nil:
				rt.Errorf("%s: %v", who, err)
			}
		})
	}
	end(client, up, down, "client")
	end(server, down, up, "server")
	wg.Wait()
}

// loop is a connection to itself: what is written is read next.
type loop struct {
	net.Conn
	bytes.Buffer
}

func (l *loop) Read(b []byte) (int, error)  { return l.Buffer.Read(b) }
func (l *loop) Write(b []byte) (int, error) { return l.Buffer.Write(b) }

// TestAllocations sends and receives without allocating.
func TestAllocations(t *testing.T) {
	if race {
		t.Skip("with the race detector, pools drop what they are given")
	}
	client, server := connected(t, clientConfig(), serverConfig())
	l := &loop{}
	client.nc, server.nc = l, l
	for _, size := range []int{28, 4096 + 16, 1 << 20} {
		b, header := make([]byte, size-16), make([]byte, 16)
		v := net.Buffers{header, b}
		into := make([]byte, 256<<10)
		run := func() {
			if _, err := client.WriteVec(v); err != nil {
				t.Fatal(err)
			}
			for n := 0; n < size; {
				k, err := server.Read(into)
				if err != nil {
					t.Fatal(err)
				}
				n += k
			}
		}
		run()
		if n := testing.AllocsPerRun(100, run); n >= 1 {
			t.Errorf("%d bytes take %v allocations", size, n)
		}
	}
}

func BenchmarkConn(b *testing.B) {
	for _, x := range suites[:2] {
		for _, size := range []int{4 << 10, 1 << 20} {
			b.Run(x.name+"/"+map[int]string{4 << 10: "4KiB", 1 << 20: "1MiB"}[size], func(b *testing.B) {
				nc, ns := sockets(b)
				client, server := Client(nc, clientConfig()), Server(ns, serverConfig())
				client.suites = []*suite{x}
				if errA, errB := both(client, server); errA != nil || errB != nil {
					b.Fatal(errA, errB)
				}
				b.SetBytes(int64(size))
				b.ReportAllocs()
				var wg sync.WaitGroup
				wg.Go(func() {
					data := make([]byte, size)
					for range b.N {
						if _, err := client.Write(data); err != nil {
							b.Error(err)
							return
						}
					}
					_ = client.CloseWrite()
				})
				into := make([]byte, 256<<10)
				for {
					if _, err := server.Read(into); err != nil {
						if !errors.Is(err, io.EOF) {
							b.Error(err)
						}
						break
					}
				}
				wg.Wait()
			})
		}
	}
}
