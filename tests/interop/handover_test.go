package interop

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/tests/daemon"
)

// A disk goes from one daemon to another and back, both of which have it open, while a guest writes
// to it: blockdev-set-active.

const (
	handedBlock = 4 << 10
	handedSize  = 8 << 20
	bitmapGrain = 64 << 10
)

// handed is the disk as its guest knows it, in blocks, each of which was written with one number.
type handed struct {
	rng   *rand.Rand
	next  uint64
	now   []uint64           // what was acknowledged last; 0: zeroes
	since map[int64][]uint64 // by block: what it may still be instead, as there was no flush
	dirty map[int64]bool     // granules written since the bitmap was cleared
	doing int64              // the block that a request is about that was not answered, or -1
	loose bool               // the bitmap may say more than dirty
	stop  atomic.Bool
	did   chan struct{} // one for each request that was acknowledged
}

func (h *handed) content(v uint64) []byte {
	b := make([]byte, handedBlock)
	for i := 0; v != 0 && i < len(b); i += 8 {
		binary.BigEndian.PutUint64(b[i:], v)
	}
	return b
}

// run writes until a request fails, and returns that error, or until it is to stop.
func (h *handed) run(n *daemon.NBD) error {
	for !h.stop.Load() {
		k := h.rng.Int64N(int64(len(h.now)))
		v, err := uint64(0), error(nil)
		h.doing = k
		switch h.rng.IntN(12) {
		case 0:
			if err = n.Flush(); err == nil {
				clear(h.since)
			}
			k = -1
		case 1:
			err = n.Zero(k*handedBlock, handedBlock)
		default:
			h.next++
			v = h.next
			err = n.WriteAt(h.content(v), k*handedBlock)
		}
		if k < 0 {
			h.doing = -1
		}
		if err != nil {
			if k >= 0 {
				h.since[k] = append(h.since[k], v)
			}
			return err
		}
		if k >= 0 {
			h.since[k] = append(h.since[k], h.now[k])
			h.now[k] = v
			h.dirty[k*handedBlock/bitmapGrain] = true
		}
		h.doing = -1
		select {
		case h.did <- struct{}{}:
		default:
		}
	}
	return syscall.EPERM // as if it had been refused
}

// check compares all of the disk. exact: nothing but what was acknowledged last may be there, save
// in the block of a request that was not answered.
func (h *handed) check(n *daemon.NBD, exact bool) error {
	all := make([]byte, handedSize)
	for off := 0; off < handedSize; off += 1 << 20 {
		if err := n.ReadAt(all[off:off+1<<20], int64(off)); err != nil {
			return err
		}
	}
	for k, want := range h.now {
		got := all[k*handedBlock:][:handedBlock]
		v := binary.BigEndian.Uint64(got)
		if !bytes.Equal(got, h.content(v)) {
			return fmt.Errorf("block %d is torn", k)
		}
		if v != want {
			if (exact && int64(k) != h.doing) || !slices.Contains(h.since[int64(k)], v) {
				return fmt.Errorf("block %d has %d, and not %d; without a flush %v", k, v, want, h.since[int64(k)])
			}
			h.now[k] = v
		}
	}
	clear(h.since)
	return nil
}

// host is one of the daemons.
type host struct {
	d    *daemon.Daemon
	q    *daemon.QMP
	qemu bool
}

func newHost(t *testing.T, bin, dir, image string, active bool) *host {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	qemu := bin != ""
	if !qemu {
		bin = daemon.Binary(t)
	}
	h := &host{d: daemon.StartBinary(t, bin, dir), qemu: qemu}
	h.q = h.d.Dial(t)
	file := daemon.Blockdev("file", "f", map[string]any{"filename": image, "active": active})
	h.q.Must(t, "blockdev-add", daemon.Blockdev("qcow2", "d", map[string]any{"file": file, "active": active}))
	h.q.Must(t, "block-export-add", map[string]any{
		"type": "nbd", "id": "e", "node-name": "d", "name": "d", "writable": true, "allow-inactive": true,
	})
	return h
}

func (h *host) setActive(active bool) error {
	_, err := h.q.Do("blockdev-set-active", map[string]any{"node-name": "d", "active": active})
	return err
}

// checkBitmap compares bitmap b with what the guest has written since it was cleared.
func (h *host) checkBitmap(t *testing.T, g *handed, exact bool) error {
	h.q.Must(t, "block-export-add", map[string]any{
		"type": "nbd", "id": "b", "node-name": "d", "name": "b", "bitmaps": []string{"b"}, "writable": true,
	})
	defer func() {
		h.q.Must(t, "block-export-del", map[string]any{"id": "b", "mode": "hard"})
		h.q.Wait(t, "BLOCK_EXPORT_DELETED", map[string]any{"id": "b"})
	}()
	const context = "qemu:dirty-bitmap:b"
	s, err := daemon.DialStatus(h.d.NBDSocket(), "b", time.Now().Add(20*time.Second), context)
	if err != nil {
		return err
	}
	defer s.Drop()
	m, err := s.Ask(0, handedSize)
	if err != nil {
		return err
	}
	off := int64(0)
	for _, x := range m[context] {
		for end := off + int64(x.N); off < end; off += bitmapGrain {
			got, want := x.Flags&nbdwire.StateDirty != 0, g.dirty[off/bitmapGrain]
			maybe := g.doing >= 0 && g.doing*handedBlock/bitmapGrain == off/bitmapGrain
			if got != want && !maybe && (exact || !got) {
				return fmt.Errorf("the bitmap says %v at %d", got, off)
			}
		}
	}
	return nil
}

func TestHandover(t *testing.T) {
	qsd10, _ := exec.LookPath("qsd10")
	for _, c := range []struct{ name, other string }{{"ours", ""}, {"QEMU", qsd10}} {
		t.Run(c.name, func(t *testing.T) {
			if c.name != "ours" && c.other == "" {
				t.Skip("SKIPPED: qsd10 is not installed")
			}
			need(t, "qemu-img")
			testHandover(t, c.other)
		})
	}
}

func testHandover(t *testing.T, other string) {
	dir := t.TempDir()
	sh(t, dir, "qemu-img create -q -f qcow2 base.qcow2 %d && qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 d.qcow2 && "+
		"qemu-img bitmap --add -g %d d.qcow2 b", handedSize, bitmapGrain)
	image := filepath.Join(dir, "d.qcow2")
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	g := &handed{
		rng: rand.New(rand.NewPCG(seed, 1)), now: make([]uint64, handedSize/handedBlock),
		since: map[int64][]uint64{}, dirty: map[int64]bool{}, doing: -1, did: make(chan struct{}, 1),
	}
	hosts := [2]*host{
		newHost(t, "", filepath.Join(dir, "a"), image, true),
		newHost(t, other, filepath.Join(dir, "b"), image, false),
	}
	for round := range 24 {
		from, to := hosts[round%2], hosts[(round+1)%2]
		kill := round%8 == 6 // the first is ours
		// QEMU would not look at the file's length again.
		if !to.qemu && to.setActive(true) == nil {
			t.Fatalf("round %d: both are active", round)
		}
		n, err := from.d.DialNBD("d")
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		g.stop.Store(false)
		go func() { ended <- g.run(n) }()
		for range 20 + round*7%40 {
			<-g.did
		}
		if from.qemu {
			// QEMU 10.0 forgets some of what it acknowledges while it makes a node inactive.
			g.stop.Store(true)
			ended <- <-ended
		}
		if kill {
			from.d.Kill()
		} else if err := from.setActive(false); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := <-ended; !kill && !errors.Is(err, syscall.EPERM) {
			t.Fatalf("round %d: the guest was told %v", round, err)
		}
		n.Drop()
		if err := to.setActive(true); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if n, err = to.d.DialNBD("d"); err != nil {
			t.Fatal(err)
		}
		if err := g.check(n, !kill); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		n.Drop()
		g.nextBitmap(t, to, round, kill)
		if kill {
			hosts[round%2] = newHost(t, "", filepath.Join(dir, fmt.Sprint("a", round)), image, false)
		}
	}
	for _, h := range hosts {
		h.d.Stop(t)
	}
	// A daemon that was killed leaves clusters that nobody uses.
	sh(t, dir, "qemu-img check d.qcow2 || [ $? = 3 ]")
}

// nextBitmap checks the bitmap where the disk has come to, and clears it or makes another.
func (h *handed) nextBitmap(t *testing.T, to *host, round int, kill bool) {
	var nodes []struct {
		Name    string `json:"node-name"`
		Bitmaps []struct {
			Inconsistent bool `json:"inconsistent"`
		} `json:"dirty-bitmaps"`
	}
	b := to.q.Must(t, "query-named-block-nodes", map[string]any{"flat": true})
	if err := json.Unmarshal(b, &nodes); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		if n.Name != "d" {
			continue
		}
		if len(n.Bitmaps) != 1 {
			t.Fatalf("round %d: %d bitmaps", round, len(n.Bitmaps))
		}
		if bad := n.Bitmaps[0].Inconsistent; bad && kill {
			arg := map[string]any{"node": "d", "name": "b"}
			to.q.Must(t, "block-dirty-bitmap-remove", arg)
			arg["persistent"], arg["granularity"] = true, bitmapGrain
			to.q.Must(t, "block-dirty-bitmap-add", arg)
			clear(h.dirty)
			h.loose = false
			return
		} else if bad {
			t.Fatalf("round %d: the bitmap is inconsistent", round)
		}
	}
	h.loose = h.loose || kill // then it may have more than was written
	if err := to.checkBitmap(t, h, !h.loose); err != nil {
		t.Fatalf("round %d: %v", round, err)
	}
	if round%3 == 0 {
		h.loose = false
		to.q.Must(t, "block-dirty-bitmap-clear", map[string]any{"node": "d", "name": "b"})
		clear(h.dirty)
	}
}
