package mirror_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/jobs/jobtest"
	"qblockd/jobs/mirror"
	"qblockd/schema/types"
)

// newWorldOf is newWorld with a disk of another size, which takes discards.
func newWorldOf(t testing.TB, size int) *world {
	g, _ := drivertest.NewGraphSink(t)
	w := &world{t: t, g: g, Events: jobtest.NewEvents()}
	w.m = jobs.NewManager(w, nil)
	content := make([]byte, size)
	r := rand.New(rand.NewPCG(5, 5))
	for i := 0; i < size; i += 512 {
		content[i] = byte(1 + r.IntN(255))
	}
	w.from, w.to, w.want = drivertest.MemFileOf(content), drivertest.NewMemFile(int64(size)), bytes.Clone(content)
	w.fromF, w.toF = drivertest.NewFault(w.from), drivertest.NewFault(w.to)
	w.source, w.target = drivertest.AddNode(t, w.g, "source", w.fromF), drivertest.AddNode(t, w.g, "target", w.toF)
	w.guest = drivertest.AddRoot(t, w.g, w.source, drivertest.Writer)
	w.shape = jobtest.Look(w.g)
	return w
}

// A granule may be longer than what is copied at once, or than the disk.
func TestGranularities(t *testing.T) {
	for _, mode := range modes {
		for granularity := int64(1024); granularity <= 64<<20; granularity *= 8 {
			w := newWorldOf(t, 5<<19+1536)
			a := w.args(mode)
			a.Granularity = new(uint32(granularity))
			j := w.start(a)
			if !w.Await(ready) {
				t.Fatal(j.Err())
			}
			for _, off := range []int64{0, 1<<20 + 512, 2<<20 - 512, 5 << 19} {
				if err := jobtest.Write(w.guest, off, bytes.Repeat([]byte{0xee}, 1024)); err != nil {
					t.Fatal(err)
				}
				copy(w.want[off:], bytes.Repeat([]byte{0xee}, 1024))
			}
			if err := j.Complete(context.Background()); err != nil {
				t.Fatal(err)
			}
			if <-j.Finished(); j.Err() != nil || !bytes.Equal(w.to.Bytes(), w.want) {
				t.Errorf("%s, granules of %d bytes: %v, or the target differs", mode, granularity, j.Err())
			}
		}
	}
}

// passes counts how often the job reads each piece of the disk; at each it lets the guest write to,
// or discard, a far away one, so that there is always something left to do.
type passes struct {
	mu   sync.Mutex
	n    map[int64]int
	most int
}

const piece = 1 << 20

func (w *world) busy(guest func(off int64)) *passes {
	p := &passes{n: map[int64]int{}}
	var inside atomic.Bool
	w.fromF.Hook(func(op drivertest.Op, off, n int64) {
		if op != drivertest.OpRead || !inside.CompareAndSwap(false, true) {
			return // a read that the guest's own request makes
		}
		defer inside.Store(false)
		at := off / piece
		p.mu.Lock()
		if off%piece == 0 {
			p.n[at]++
			p.most = max(p.most, p.n[at])
		}
		p.mu.Unlock()
		for range 2 {
			at = (at + int64(len(w.want)/piece/2)) % int64(len(w.want)/piece)
			if at != off/piece {
				guest(at * piece)
			}
		}
	})
	return p
}

// A job gets ready, and to its end, in a few passes, however busy its guest is: whoever writes
// keeps half of the disk dirty for as long as writes are only recorded.
func TestReadyInBoundedPasses(t *testing.T) {
	for _, mode := range modes {
		for _, granularity := range []int64{64 << 10, 4 << 20} {
			for _, discards := range []bool{granularity > piece} {
				w := newWorldOf(t, 10*piece)
				what := bytes.Repeat([]byte{1, 2}, piece/4)
				p := w.busy(func(off int64) {
					r := w.guest.TryBegin()
					if r == nil {
						return // the source is held quiet
					}
					defer w.guest.End(r)
					err := w.guest.WriteAt(r, blk.Buf(what), off, 0)
					if err == nil && discards {
						err = w.guest.Discard(r, off+4096, piece/4-512)
					}
					if err != nil {
						t.Error(err)
					}
				})
				a := w.args(mode)
				a.Granularity = new(uint32(granularity))
				j := w.start(a)
				if !w.Await(ready) {
					t.Fatal(j.Err())
				}
				most := mirror.MostPasses
				if mode == types.MirrorCopyModeWriteBlocking {
					most = 2 // what was there, and what was written before the switch
				}
				p.mu.Lock()
				if p.most > most {
					t.Errorf("%s, granules of %d bytes: ready after %d passes", mode, granularity, p.most)
				}
				clear(p.n)
				p.most = 0
				p.mu.Unlock()
				if err := jobtest.Write(w.guest, 0, what); err != nil {
					t.Fatal(err)
				}
				if err := j.Complete(context.Background()); err != nil {
					t.Fatal(err)
				}
				w.Await(func(e events.Event) bool { _, ok := e.(types.BlockJobCompletedEvent); return ok })
				if p.most > most {
					t.Errorf("%s, granules of %d bytes: over after %d passes", mode, granularity, p.most)
				}
				if <-j.Finished(); j.Err() != nil || !bytes.Equal(w.to.Bytes(), w.from.Bytes()) {
					t.Errorf("%v, or the sides differ", j.Err())
				}
			}
		}
	}
}

// named is an image with a backing file that nobody has opened.
type named struct{ *drivertest.MemFile }

func (named) BackingFile() (name, format string) { return "below", "" }

// The target's clusters are copied as a whole where granules are smaller and its backing file is
// not opened. The job gets on as well where one begins with zeroes and more is dirty than is copied
// at once.
func TestWholeClustersOfLongRanges(t *testing.T) {
	const cluster, size, off = 64 << 10, 2 << 20, 16 << 10
	for _, mode := range modes {
		w := newWorldOf(t, size)
		clear(w.want)
		w.from = drivertest.NewMemFile(size)
		w.source = drivertest.AddNode(t, w.g, "zeroes", w.from)
		w.guest = drivertest.AddRoot(t, w.g, w.source, drivertest.Writer)
		image := named{drivertest.NewMemFileOptions(size, drivertest.MemOptions{Limits: blk.Limits{ClusterSize: cluster}})}
		w.target = drivertest.AddNode(t, w.g, "image", image)
		a := w.args(mode)
		// Slow until it is told to end.
		a.Sync, a.Granularity, a.Speed = types.MirrorSyncModeNone, new(uint32(4096)), new(int64(1))
		j := w.start(a)
		if !w.Await(ready) {
			t.Fatal(j.Err())
		}
		p := bytes.Repeat([]byte("x"), size-off)
		copy(w.want[off:], p)
		if err := jobtest.Write(w.guest, off, p); err != nil {
			t.Fatal(err)
		}
		j.Cancel(false)
		select {
		case <-j.Finished():
		case <-time.After(time.Minute):
			t.Fatalf("%s: the job hangs", mode)
		}
		if j.Err() != nil || !bytes.Equal(image.Bytes(), w.want) {
			t.Errorf("%s: %v, or the target differs", mode, j.Err())
		}
	}
}
