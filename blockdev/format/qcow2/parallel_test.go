package qcow2

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph/blk"
)

// TestParallel lets many goroutines work on stripes that share clusters at their ends, while
// others flush; each sees its own writes, and the image stays sound.
func TestParallel(t *testing.T) {
	for _, sh := range []shape{
		{cs: 512, bits: 16, v: "v3"}, {cs: 4096, bits: 1, v: "v3"}, {cs: 65536, bits: 16, v: "v3"},
		{cs: 1024, bits: 64, v: "v3", lazy: true}, {cs: 4096, bits: 16, v: "v2"},
	} {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) { parallel(t, sh) })
	}
}

func parallel(t *testing.T, sh shape) {
	const workers = 8
	stripe := int(sh.cs)*6 + 1536
	f := mustCreate(t, sh.options(uint64(workers*stripe)))
	s := mustOpen(t, mem{f}, config{unmap: true, options: smallCaches})
	setCaches(s, 3, 2)
	var wg, fl sync.WaitGroup
	stop := make(chan struct{})
	fl.Add(1)
	go func() {
		defer fl.Done()
		for {
			select {
			case <-stop:
				return
			default:
				if err := s.Flush(req()); err != nil {
					t.Error(err)
					return
				}
			}
		}
	}()
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := stripeWorker(s, w*stripe, stripe, uint64(w)); err != nil {
				t.Errorf("worker %d: %v", w, err)
			}
		}()
	}
	wg.Wait()
	close(stop)
	fl.Wait()
	if t.Failed() {
		return
	}
	mustClose(t, s)
	s = mustOpen(t, mem{f}, config{readOnly: true})
	sound(t, s, false)
}

func stripeWorker(s *image, base, n int, seed uint64) error {
	rnd := rand.New(rand.NewPCG(seed, 3))
	mine := make([]byte, n)
	cs := int(s.cs)
	steps := 150
	for range steps {
		at := rnd.IntN(n/512) * 512
		k := min((1+rnd.IntN(2*cs/512))*512, n-at)
		off := int64(base + at)
		var err error
		switch rnd.IntN(8) {
		case 0, 1, 2:
			fill(rnd, mine[at:at+k])
			err = s.WriteAt(req(), blk.Buf(bytes.Clone(mine[at:at+k])), off, 0)
		case 3:
			from, to := (base+at+cs-1)/cs*cs, (base+at+k)/cs*cs
			if from >= to {
				continue
			}
			if err = s.Discard(req(), int64(from), int64(to-from)); err == nil {
				clear(mine[from-base : to-base])
			}
		case 4:
			if err = s.Zero(req(), off, int64(k), blk.MayUnmap); errors.Is(err, blk.ErrNotSupported) {
				err = s.WriteAt(req(), blk.Buf(make([]byte, k)), off, 0)
			}
			clear(mine[at : at+k])
		case 5:
			_, err = s.Status(req(), off, int64(k))
		default:
			b := make([]byte, k)
			if err = s.ReadAt(req(), blk.Buf(b), off, 0); err == nil && !bytes.Equal(b, mine[at:at+k]) {
				err = fmt.Errorf("read %d+%d: wrong content", off, k)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// TestQuarantine: readers of clusters that are discarded and allocated anew never see another
// cluster's new data.
func TestQuarantine(t *testing.T) {
	const cs, clusters = 4096, 16
	f := mustCreate(t, CreateOptions{Size: cs * clusters, ClusterSize: ptr(uint64(cs))})
	s := mustOpen(t, mem{drivertest.NewFault(f)}, config{unmap: true})
	var wg sync.WaitGroup
	for w := range clusters {
		wg.Add(1)
		go func() {
			defer wg.Done()
			b := make([]byte, cs)
			for i := range 60 {
				off := int64(w * cs)
				if err := s.WriteAt(req(), blk.Buf(bytes.Repeat([]byte{byte(w + 1)}, cs)), off, 0); err != nil {
					t.Error(err)
				}
				// Another one's cluster: its bytes or zeroes, nobody else's.
				o := (w + i) % clusters
				if err := s.ReadAt(req(), blk.Buf(b), int64(o*cs), 0); err != nil {
					t.Error(err)
				}
				for _, v := range b {
					if v != 0 && v != byte(o+1) {
						t.Errorf("cluster %d shows %d", o, v)
						break
					}
				}
				if err := s.Discard(req(), off, cs); err != nil {
					t.Error(err)
				}
				if i%8 == 0 {
					if err := s.Flush(req()); err != nil {
						t.Error(err)
					}
				}
			}
		}()
	}
	wg.Wait()
	mustClose(t, s)
	s = mustOpen(t, mem{f}, config{readOnly: true})
	sound(t, s, false)
}

// TestCompressedNoWait: a read that must not wait does not wait for mu with what it has read, which
// others may hold for long.
func TestCompressedNoWait(t *testing.T) {
	s := mustOpen(t, mem{mustCreate(t, CreateOptions{Size: 1 << 20})}, config{})
	want := bytes.Repeat([]byte{7}, 64<<10)
	if err := s.WriteAt(req(), blk.Buf(want), 0, blk.Compressed); err != nil {
		t.Fatal(err)
	}
	held, free, ended := make(chan struct{}), make(chan struct{}), make(chan error)
	s.debug = func(_ *blk.Req, e blk.DebugEvent) {
		if e == blk.EvReadCompressed {
			go func() {
				s.mu.Lock()
				close(held)
				<-free
				s.mu.Unlock()
			}()
			<-held
		}
	}
	got := make([]byte, len(want))
	go func() { ended <- s.ReadAt(&blk.Req{NoWait: true}, blk.Buf(got), 0, 0) }()
	select {
	case err := <-ended:
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("read %x: %v", got[:8], err)
		}
		close(free)
	case <-time.After(20 * time.Second):
		t.Error("the read waits for mu")
		close(free)
		<-ended
	}
	mustClose(t, s)
}
