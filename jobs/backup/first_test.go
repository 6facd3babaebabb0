package backup_test

import (
	"bytes"
	"context"
	"errors"
	"runtime"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/transaction"
	"qblockd/jobs/backup"
	"qblockd/jobs/jobtest"
	"qblockd/schema/types"
)

// held is a step that leaves its job held when the command is over.
type held struct{ *backup.Step }

func (held) Clean() {}

// Guests have copied all there is, or are about to, when the job looks for the first time. It waits
// for them, tells what they have copied, and its bitmap forgets only what is on stable storage.
func TestGuestsComeBeforeTheJob(t *testing.T) {
	for _, c := range []struct {
		name string
		rule drivertest.Rule // of the target
		busy bool            // the guest's copy is under way when the job looks
		want error
	}{
		{name: "copied"},
		{name: "being copied", busy: true},
		{name: "being copied, and that fails", busy: true, rule: drivertest.Rule{Ops: drivertest.OpWrite, Count: 1}},
		{name: "being copied, and all fails", busy: true, rule: drivertest.Rule{Ops: drivertest.OpWrite}, want: syscall.EIO},
		{name: "copied, and the flush fails", rule: drivertest.Rule{Ops: drivertest.OpFlush}, want: syscall.EIO},
	} {
		t.Run(c.name, func(t *testing.T) { guestFirst(t, c.rule, c.busy, c.want) })
	}
}

func guestFirst(t *testing.T, rule drivertest.Rule, busy bool, want error) {
	content := bytes.Repeat([]byte{0xaa}, cluster/2)
	medium := drivertest.NewCrashFile(int64(len(content)))
	w := newWorldOf(t, drivertest.MemFileOf(content), medium, content)
	b, err := w.source.Bitmaps().New(graph.DirtyBitmapSpec{Name: "b", Granularity: 512})
	if err != nil {
		t.Fatal(err)
	}
	b.Bits().SetAll()
	w.shape = jobtest.Look(w.g)
	a := w.args()
	a.XPerf.UseCopyRange = new(false)
	a.Sync, a.Bitmap, a.BitmapMode = types.MirrorSyncModeBitmap, new("b"), new(types.BitmapSyncModeAlways)
	s := w.step(a)
	if err := transaction.Run(context.Background(), w.g, held{s}); err != nil {
		t.Fatal(err)
	}
	if rule.Ops != 0 {
		w.toF.Inject(rule)
	}
	copying, goOn, written := make(chan struct{}, 10), make(chan struct{}), make(chan error, 1)
	if busy {
		w.toF.Hook(func(op drivertest.Op, _, _ int64) {
			if op == drivertest.OpWrite {
				copying <- struct{}{}
				<-goOn
			}
		})
	}
	go func() { written <- jobtest.Write(w.guest, 0, []byte("guest")) }()
	if busy {
		<-copying
	} else if err := <-written; err != nil {
		t.Fatal(err)
	}
	s.Clean()
	j := w.m.Get("j")
	for w.m.Query()[0].TotalProgress == 0 {
		runtime.Gosched() // it has not looked yet
	}
	s.Release()
	close(goOn)
	if busy {
		if err := <-written; (err != nil) != (rule.Ops != 0) {
			t.Errorf("the guest's write: %v", err)
		}
	}
	<-j.Finished()
	if q := w.m.Query()[0]; want == nil && (q.CurrentProgress != cluster || q.TotalProgress != cluster) {
		t.Errorf("it ends at %d of %d", q.CurrentProgress, q.TotalProgress)
	}
	if err := w.end(j); !errors.Is(err, want) {
		t.Errorf("outcome: %v", err)
	}
	if want != nil {
		if n := b.Bits().Count(); n != int64(len(content)) {
			t.Errorf("%d bytes are dirty after a failure", n)
		}
		return
	}
	_, _, dirty := b.Bits().NextDirty(512, int64(len(content)))
	if dirty || !bytes.Equal(medium.Durable().Bytes(), content) {
		t.Errorf("dirty: %v, or the target differs", dirty)
	}
}
