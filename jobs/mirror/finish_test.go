package mirror_test

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/events"
	"qblockd/schema/types"
)

// What fails when a job is finalized ends it, whatever the policy is: it can neither pause nor try again for ever while somebody waits for the answer.
func TestFaultsWhileFinalizing(t *testing.T) {
	for _, mode := range modes {
		for _, policy := range []types.BlockdevOnError{types.BlockdevOnErrorStop, types.BlockdevOnErrorEnospc, types.BlockdevOnErrorIgnore} {
			const size = 8 << 20 // more than is copied with the source held quiet
			w := newWorldOf(t, size)
			a := w.args(mode)
			a.ManualFinalize, a.OnTargetError = true, policy
			j := w.start(a)
			if !w.await(ready) {
				t.Fatal(j.Err())
			}
			if err := j.Complete(context.Background()); err != nil {
				t.Fatal(err)
			}
			w.await(func(e events.Event) bool { _, ok := e.(types.BlockJobPendingEvent); return ok })
			w.toF.Inject(drivertest.Rule{Ops: drivertest.OpModify, Err: syscall.ENOSPC})
			if err := w.write(w.guest, 0, bytes.Repeat([]byte("x"), size)); err != nil {
				t.Fatal(err)
			}
			if err := j.Finalize(); err != nil {
				t.Errorf("%s, %s: %v", mode, policy, err)
			}
			if err := w.end(j, "source"); !errors.Is(err, syscall.ENOSPC) {
				t.Errorf("%s, %s: outcome: %v", mode, policy, err)
			}
		}
	}
}
