package geometry

import (
	"fmt"
	"math/rand/v2"

	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/rig"
	"qblockd/tests/trial"
)

// drive is how drive-mirror and drive-backup come to their target: by the name of a file.
type drive struct {
	Mode     types.NewImageMode // "": the target is a node
	Guess    bool               // no format is given
	Named    bool               // the node of a mirror's target has a name
	Replaces bool               // and the node that it replaces is named, too
	NoUnmap  bool               // zeroes of a mirror do not become holes
}

func (d drive) String() string {
	return fmt.Sprintf("drive %s guess %v named %v replaces %v no-unmap %v", d.Mode, d.Guess, d.Named, d.Replaces, d.NoUnmap)
}

// drawDrive lets the job open its target by name, or make it.
func (s *Sample) drawDrive(r *rand.Rand) {
	s.Drive = drive{Mode: trial.Pick(r, types.NewImageModeExisting, types.NewImageModeAbsolutePaths),
		Guess: trial.One(r, 2), Named: trial.One(r, 2), NoUnmap: trial.One(r, 3)}
	s.Drive.Replaces = s.Drive.Named && trial.One(r, 2)
	if s.Under == "header" {
		s.Under = "chain" // the job opens it
	}
	if s.Drive.Mode == types.NewImageModeExisting {
		s.Skip += trial.Pick(r, 0, 8, 24) // beyond what opens the file
		return
	}
	s.Real, s.Fault, s.Kill = true, "", 0 // it makes files of the host only
	raw := s.Target.Raw
	if s.Drive.Guess {
		raw = s.Layers[0].Raw
	}
	s.Target = Layer{Size: blk.AlignUp(s.Layers[0].Size, 512), Raw: raw}
	if !raw {
		s.Target.Cluster, s.Target.Bits = 65536, 16
	}
	s.Compress = s.Compress && !raw
	if s.Kind == "mirror" && !raw && trial.One(r, 6) {
		s.Sync = types.MirrorSyncModeNone
		if s.End == "success" {
			s.End = "leave"
		}
	}
	switch s.Under = ""; s.Sync {
	case types.MirrorSyncModeTop:
		s.Under = "chain"
	case types.MirrorSyncModeNone:
		s.Under = "source"
	}
}

// namedOnly leaves of all nodes only the source, with what lies below it as its header says.
func (w *world) namedOnly() {
	for _, name := range []string{"t", "u", "l0", "l1", "l2"} {
		if w.x.Graph.Node(name) != nil {
			trial.Must(w.x.Nodes.Del(w.ctx, name))
		}
	}
	trial.Must(w.x.Nodes.Add(w.ctx, w.options("l0", w.Layers[0], nil)))
}

// openTarget opens the target of a job that is over, whose node went with the last that used it.
func (w *world) openTarget() {
	if n := w.x.Graph.Node("t"); n != nil {
		trial.Fail("the target's node is still there")
	}
	var below *types.BlockdevRefOrNull
	if w.Under == "source" { // which is open for writing
		below = &types.BlockdevRefOrNull{Reference: rig.Ptr("l0")}
	}
	if err := w.x.Nodes.Add(w.ctx, w.options("t", w.Target, below)); err != nil {
		trial.Fail("the target is to be opened again: %w", err)
	}
}

// format is what the command says of the target's.
func (d drive) format(w *world) *string {
	if d.Guess {
		return nil
	}
	return rig.Ptr(string(w.format("t")))
}

func (w *world) driveMirror() error {
	d := w.Drive
	a := &types.DriveMirror{JobID: rig.Ptr(id), Device: "l0", Target: w.x.Path("t"), Format: d.format(w),
		Mode: &d.Mode, Sync: w.Sync, Speed: &w.Speed, BufSize: &w.BufSize,
		OnSourceError: &w.OnError, OnTargetError: &w.OnError, CopyMode: &w.Mode,
		Unmap: rig.Ptr(!d.NoUnmap), AutoFinalize: rig.Ptr(!w.Manual), AutoDismiss: rig.Ptr(false)}
	if w.Granularity > 0 {
		a.Granularity = rig.Ptr(uint32(w.Granularity))
	}
	if d.Named {
		a.NodeName = rig.Ptr("t")
	}
	if d.Replaces {
		a.Replaces = rig.Ptr("l0")
	}
	return w.x.BlockJob.DriveMirror(w.ctx, a)
}

// driveBackup is like a, but for the target.
func (w *world) driveBackup(a *types.BlockdevBackup) error {
	d := w.Drive
	return w.x.BlockJob.DriveBackup(w.ctx, &types.DriveBackup{JobID: a.JobID, Device: a.Device, Target: w.x.Path("t"),
		Format: d.format(w), Mode: &d.Mode, Sync: a.Sync, Speed: a.Speed, Bitmap: a.Bitmap, BitmapMode: a.BitmapMode,
		Compress: a.Compress, OnSourceError: a.OnSourceError, OnTargetError: a.OnTargetError,
		AutoFinalize: a.AutoFinalize, AutoDismiss: a.AutoDismiss, XPerf: a.XPerf})
}
