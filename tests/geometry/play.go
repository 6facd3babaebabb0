package geometry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// Outcome is what became of a sample.
type Outcome struct {
	Refused string // why the job did not begin
	Failed  string // why it failed
	Struck  bool   // an I/O has failed
	Killed  bool
	Moves   int64 // how much has happened
}

// Run plays a sample and tells what was not as it should be. limit is how long nothing may happen
// in it.
func Run(s Sample, limit time.Duration) (Outcome, error) {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	dir := ""
	if s.Real {
		d, err := os.MkdirTemp("", "qblockd-geometry-")
		if err != nil {
			return Outcome{}, err
		}
		defer os.RemoveAll(d)
		dir = d
	}
	w := newWorld(ctx, s, dir)
	var o Outcome
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		o, err = w.play()
		o.Moves = w.moves()
	}()
	if hangs := w.watch(done, limit, cancel); hangs != nil {
		return Outcome{}, hangs
	}
	return o, err
}

func (w *world) play() (o Outcome, err error) {
	err = trial.Run(func() { w.scenario(&o) })
	w.clear()
	if errors.Is(err, blk.ErrNoMedium) && w.struck && givenUp(w.x.Graph) {
		o.Failed = "an image was given up"
		return o, w.x.Close()
	}
	if err == nil {
		err = trial.Run(w.finish)
	}
	return o, errors.Join(err, w.x.Close())
}

// givenUp tells whether an image is used no more as nobody knows what is in its file: a change of
// its header failed, and so did taking that back.
func givenUp(g *graph.Graph) bool {
	return slices.ContainsFunc(g.Nodes(), func(n *graph.Node) bool {
		x, ok := n.Driver().(graph.Ejecter)
		return ok && x.Ejected()
	})
}

const id = "j"

// scenario runs the job and looks at what it has made.
func (w *world) scenario(o *Outcome) {
	trial.In("before the job", w.build)
	e := &ended{w: w, bitmap: w.prepare(), allocated: w.allocation(), guests: w.guests(), start: slices.Clone(w.data)}
	w.arm()
	if err := w.begin(); err != nil {
		o.Refused = err.Error()
		if w.Drive.Mode == types.NewImageModeAbsolutePaths {
			w.target = nil // there is no such file
		}
		trial.Must(errors.Join(e.guests.stop(), e.guests.leave(), w.expected(err)))
		return
	}
	e.j = w.x.Jobs.Get(id)
	if w.Guests == 2 && len(e.guests) == 1 {
		g, err := w.start("l0", int64(len(w.data))/2/512*512, int64(len(w.data)), 4)
		if err == nil {
			e.guests = append(e.guests, g)
		} else if w.Kind != "active" { // which needs a consistent chain
			trial.Must(err)
		}
	}
	for _, g := range e.guests {
		g.faulty = w.Fault != ""
		g.run()
	}
	err := trial.Run(func() { w.drive(e.j, e.guests) })
	trial.Must(errors.Join(err, e.guests.stop()))
	w.clear()
	if e := e.j.Err(); e != nil {
		o.Failed = e.Error()
	}
	o.Struck = w.struck
	if w.power != nil && w.power.files != nil {
		o.Killed = true
		w.afterKill(e.start)
	}
	e.check()
}

// prepare makes the bitmaps and writes what the backup's has recorded.
func (w *world) prepare() (was *bitmap.Bitmap) {
	add := func(name string, granularity int64) *graph.DirtyBitmap {
		spec := graph.DirtyBitmapSpec{Name: name, Granularity: granularity}
		return trial.Get(w.x.Graph.Node("l0").Bitmaps().New(spec))
	}
	if w.Watch > 0 {
		add("watch", w.Watch)
	}
	if w.Bitmap > 0 {
		d := add("b", w.Bitmap)
		for _, s := range w.filled {
			if trial.One(w.r, 2) {
				w.space.setTo(d.Bits(), s.off, s.n)
			}
		}
		was = d.Bits().Clone()
	}
	return was
}

// allocation tells what the top of the source holds itself.
func (w *world) allocation() *bitmap.Bitmap {
	b := bitmap.New(blk.AlignUp(w.Layers[0].Size, 512), 512)
	w.extents("l0", func(off int64, x blk.Extent) {
		if x.Allocated {
			b.Set(off, x.N)
		}
	})
	return b
}

// extents calls f for all of what a node holds itself, or does not.
func (w *world) extents(name string, f func(off int64, x blk.Extent)) {
	w.with(name, true, func(root *graph.Root) {
		trial.Must(w.unit(root, func(r *blk.Req) error {
			for off, size := int64(0), root.Size(); off < size; {
				x, err := root.Edge().Status(r, off, size-off)
				if err != nil || x.N == 0 {
					return err
				}
				f(off, x)
				off += x.N
			}
			return nil
		}))
	})
}

// guests attaches those that come through the filter.
func (w *world) guests() (l guests) {
	if w.Sample.Guests == 0 || len(w.data) == 0 {
		w.Sample.Guests = 0
		return nil
	}
	size, n := int64(len(w.data)), int64(w.Sample.Guests)
	for i := range n {
		if n == 2 && i == 1 {
			break // it comes later, and past the filter
		}
		l = append(l, trial.Get(w.start("l0", size*i/n/512*512, size*(i+1)/n/512*512, 3+uint64(i))))
	}
	return l
}

// begin starts the job.
func (w *world) begin() error {
	speed, keep, auto := &w.Speed, rig.Ptr(false), rig.Ptr(!w.Manual)
	switch w.Kind {
	case "mirror":
		if w.Drive.Mode != "" {
			return w.driveMirror()
		}
		a := &types.BlockdevMirrorArgs{JobID: rig.Ptr(id), Device: "l0", Target: "t", Sync: w.Sync, Speed: speed,
			BufSize: &w.BufSize, OnSourceError: &w.OnError, OnTargetError: &w.OnError, CopyMode: &w.Mode,
			AutoFinalize: auto, AutoDismiss: keep}
		if w.Granularity > 0 {
			a.Granularity = rig.Ptr(uint32(w.Granularity))
		}
		return w.x.BlockJob.BlockdevMirror(w.ctx, a)
	case "backup":
		a := &types.BlockdevBackup{JobID: rig.Ptr(id), Device: "l0", Target: "t", Sync: w.Sync, Speed: speed,
			Compress: &w.Compress, OnSourceError: &w.OnError, OnTargetError: &w.OnError, AutoFinalize: auto, AutoDismiss: keep,
			XPerf: &types.BackupPerf{UseCopyRange: rig.Ptr(!w.Memory), MaxChunk: &w.Chunk}}
		if w.Workers > 0 {
			a.XPerf.MaxWorkers = &w.Workers
		}
		if w.Bitmap > 0 {
			a.Bitmap = rig.Ptr("b")
			if w.Sync != types.MirrorSyncModeIncremental {
				a.BitmapMode = &w.BitmapMode
			}
		}
		if w.Drive.Mode != "" {
			return w.driveBackup(a)
		}
		return w.x.BlockJob.BlockdevBackup(w.ctx, a)
	case "stream":
		a := &types.BlockStreamArgs{JobID: rig.Ptr(id), Device: "l0", Speed: speed, OnError: &w.OnError,
			AutoFinalize: auto, AutoDismiss: keep}
		if w.To < len(w.Layers) {
			if w.r.IntN(2) == 0 {
				a.BaseNode = rig.Ptr(layer(w.To))
			} else {
				a.Bottom = rig.Ptr(layer(w.To - 1))
			}
		}
		return w.x.BlockJob.BlockStream(w.ctx, a)
	default:
		a := &types.BlockCommitArgs{JobID: rig.Ptr(id), Device: "l0", BaseNode: rig.Ptr(layer(w.To)), Speed: speed,
			OnError: &w.OnError, AutoFinalize: auto, AutoDismiss: keep}
		if w.From > 0 {
			a.TopNode = rig.Ptr(layer(w.From))
		}
		return w.x.BlockJob.BlockCommit(w.ctx, a)
	}
}

// expected is nil if a refusal is one of those that a sample may meet.
func (w *world) expected(err error) error {
	texts := []string{"Source and target image have different sizes", "Bottom node", "is not in a backing chain"}
	if w.Drive.Mode != "" && w.Sync == types.MirrorSyncModeNone && w.Target.Raw {
		// It cannot have the source as its backing file.
		texts = append(texts, "Backing file not supported", "does not support backing files")
	}
	if w.Fault != "" || slices.ContainsFunc(texts, func(s string) bool { return strings.Contains(err.Error(), s) }) {
		return nil
	}
	return fmt.Errorf("refused: %w", err)
}

// drive brings the job to its end. After some time it is left in peace, and has to end before too
// much more has happened.
func (w *world) drive(j *jobs.Job, guests guests) {
	r, most := w.r, int64(0)
	for i := 0; ; i++ {
		select {
		case <-j.Finished():
			return
		case <-w.ctx.Done():
			trial.Fail("the job does not end: %w: %s", context.Cause(w.ctx), query(w.x.Jobs))
		case <-time.After(trial.Pick(r, 20*time.Microsecond, 200*time.Microsecond)):
		}
		w.steer(j, guests, i)
		switch {
		case i < quietAfter:
			w.disturb(j)
		case i == quietAfter:
			w.clear()
			_ = j.SetSpeed(0)
			most = w.moves() + mostMoves
		case w.moves() > most:
			trial.Fail("the job does not end: %s", query(w.x.Jobs))
		}
		if j.UserPaused() && (i > quietAfter || trial.One(r, 2)) {
			_ = j.Resume()
		}
		w.x.Clock.Advance(trial.Pick(r, 50*time.Millisecond, time.Second))
	}
}

// steer tells the job what is to become of it.
func (w *world) steer(j *jobs.Job, guests guests, i int) {
	status := types.JobStatus("")
	for _, q := range w.x.Jobs.Query() {
		status = q.Status
	}
	switch {
	case w.End == "cancel" && i >= w.After:
		if w.Sync == types.MirrorSyncModeNone { // what is written afterwards is nobody's
			trial.Must(guests.stop())
		}
		_ = j.Cancel(true)
	case status == types.JobStatusReady && w.End != "cancel":
		// Also of a target whose backing file nobody has opened: it does not show yet what guests
		// have to see.
		if w.End == "leave" || w.Busy || w.Under == "header" {
			trial.Must(guests.stop())
		}
		if w.End == "leave" {
			_ = j.Cancel(false)
		} else {
			_ = j.Complete(w.ctx)
		}
	case status == types.JobStatusPending:
		_ = j.Finalize()
	}
}

// disturb does what users do to a job meanwhile.
func (w *world) disturb(j *jobs.Job) {
	switch r := w.r; {
	case trial.One(r, 20):
		_ = j.Pause()
	case trial.One(r, 20) && w.space == nil: // zeroes count, too
		_ = j.SetSpeed(r.Int64N(8 << 20))
	}
	if w.Switch && trial.One(w.r, 3) {
		_ = j.ChangeCopyMode(trial.Pick(w.r, types.MirrorCopyModeBackground, types.MirrorCopyModeWriteBlocking))
	}
}

func query(m *jobs.Manager) string {
	s := ""
	for _, q := range m.Query() {
		s += fmt.Sprintf("%+v ", *q)
	}
	return s
}

// arm lets an I/O fail, or the power.
func (w *world) arm() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = true
	if w.Kill > 0 {
		w.power = &power{at: w.Kill, after: w.r.IntN(2) == 0, seed: w.Seed, medium: w.medium}
	}
	for name, f := range w.faults {
		w.armFile(name, f)
	}
}

// armFile does it for a file that is open. w.mu is held.
func (w *world) armFile(name string, f *drivertest.Fault) {
	if !w.armed {
		return
	}
	if name == w.Fault {
		f.Inject(drivertest.Rule{Skip: w.Skip, Count: w.Count, Err: w.Err})
	}
	if w.power != nil {
		f.Hook(w.power.hook)
	}
}

// clear lets nothing fail any more.
func (w *world) clear() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.armed = false
	for _, f := range w.opened {
		w.struck = w.struck || f.Failed() > 0
		f.Clear()
	}
}
