package meta

import (
	"sync"
	"sync/atomic"
	"syscall"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/tests/trial"
)

// faults are the files that can be made to fail, by name.
type faults struct {
	mu    sync.Mutex
	files map[string]*drivertest.Fault // nil: not open yet
	// tries is how many writes of guests may have to be made again: those beside a backup that
	// cannot copy what they are about to overwrite.
	tries atomic.Int32
}

// try makes a write of a guest.
func (f *faults) try(request func() error) error {
	err := request()
	if err != nil && f.tries.Add(-1) >= 0 {
		err = request()
	}
	return err
}

// may says whether the file called name, which is about to be made, can be made to fail.
func (f *faults) may(name string, can bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.files, name)
	if can {
		f.files[name] = nil
	}
}

// wrap is for rig.Store.
func (f *faults) wrap(name string, d graph.Driver) graph.Driver {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, can := f.files[name]; !can {
		return d
	}
	x := drivertest.NewFault(d)
	f.files[name] = x
	return x
}

// of is the file of m as it is open now, or nil.
func (f *faults) of(m *image) *drivertest.Fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.files[m.file()]
}

// makeFile makes m's file.
func (o *op) makeFile(m *image, size int64, align int) {
	o.faults.may(m.file(), o.x.Store != nil && o.r.IntN(2) == 0)
	trial.Must(o.x.MakeFile(m.file(), size, memOptions(o.r, align)))
}

// arm lets one of the next things that j does to the file of t fail, if it can, and chooses what
// the job is to make of that. Nobody else may change t.
func (o *op) arm(j *job, t *image, ops drivertest.Op) *types.BlockdevOnError {
	f := o.faults.of(t)
	if f == nil || o.r.IntN(2) == 0 {
		return nil
	}
	err := trial.Pick(o.r, syscall.EIO, syscall.ENOSPC)
	skip := o.r.IntN(4 << o.r.IntN(6))
	j.fault, j.failed, j.keep = f, f.Failed(), true
	t.leaky = true
	f.Inject(drivertest.Rule{Ops: ops, Skip: skip, Count: 1, Err: err})
	p := trial.Pick(o.r, types.BlockdevOnErrorReport, types.BlockdevOnErrorStop,
		types.BlockdevOnErrorEnospc, types.BlockdevOnErrorIgnore)
	o.did("I/O %d to %s will fail with %v; on-error %s", skip, t.name(), err, p)
	return &p
}

// disarm ends that, and tells whether something has failed.
func (j *job) disarm() bool {
	if j.fault == nil {
		return false
	}
	j.fault.Clear()
	return j.fault.Failed() > j.failed
}

// refused is what becomes of a job that did not begin, and of its target.
func (w *world) refused(j *job, t *image, err error) {
	if j.disarm() {
		t.unknown = true
		return
	}
	trial.Must(err)
}
