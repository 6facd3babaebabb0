package geometry

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/tests/trial"
)

// Sample is one combination.
type Sample struct {
	Seed   uint64
	Kind   string  // mirror, backup, stream, commit, active (commit)
	Layers []Layer // of the source, the top first
	Target Layer   // of mirror and backup
	Sync   types.MirrorSyncMode
	// Under is what lies below the target: "" nothing, "own" another image, "chain" what lies below
	// the source, "header" the same, which is not opened.
	Under string
	Drive drive // how drive-mirror and drive-backup come to their target
	// From and To are the layers that a commit copies from and to, or a stream to (and the one that
	// stays, which may be len(Layers)).
	From, To int

	Mode             types.MirrorCopyMode
	Switch           bool // to and fro between the modes
	Granularity      int64
	BufSize          int64
	Bitmap           int64 // granularity of the backup's; 0: none
	BitmapMode       types.BitmapSyncMode
	Watch            int64 // granularity of a bitmap that only records; 0: none
	Compress, Memory bool
	Workers, Chunk   int64
	Speed            int64
	OnError          types.BlockdevOnError
	Manual           bool

	Guests int  // 0, 1, 2, one of which comes past the filter, or 4
	Busy   bool // they do not stop before the job is ready
	End    string
	After  int    // polls until the job is cancelled
	Fault  string // file with an I/O that fails
	Skip   int    // so many pass before
	Count  int    // so many fail; 0: all from then on
	Err    syscall.Errno
	Kill   int  // the write after which the process is killed, or the power fails; 0: none
	Real   bool // on files of the host

	Huge   bool    // disks are long, and mostly empty
	Places []int64 // where they have data
}

// Layer is an image.
type Layer struct {
	Size     int64
	Raw      bool
	Cluster  int
	V2       bool
	Bits     int64
	Zstd     bool
	Fill     int // writes, zeroes and compressed writes before the job begins
	Discard  bool
	Detect   string
	Prealloc bool
}

func (l Layer) String() string {
	s := fmt.Sprintf("%d", l.Size)
	if l.Raw {
		s += " raw"
	} else {
		v := 3
		if l.V2 {
			v = 2
		}
		s += fmt.Sprintf(" v%d/%d/%d", v, l.Cluster, l.Bits)
	}
	return s + fmt.Sprintf(" fill %d discard %v detect %s zstd %v prealloc %v", l.Fill, l.Discard, l.Detect, l.Zstd, l.Prealloc)
}

func (s Sample) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "-geometry.seed=%d: %s", s.Seed, s.Kind)
	for _, l := range s.Layers {
		fmt.Fprintf(&b, " [%v]", l)
	}
	switch s.Kind {
	case "mirror":
		fmt.Fprintf(&b, " to [%v] sync %s under %q mode %s switch %v granularity %d buf-size %d", s.Target, s.Sync, s.Under, s.Mode, s.Switch, s.Granularity, s.BufSize)
	case "backup":
		fmt.Fprintf(&b, " to [%v] sync %s under %q bitmap %d %s compress %v memory %v workers %d chunk %d",
			s.Target, s.Sync, s.Under, s.Bitmap, s.BitmapMode, s.Compress, s.Memory, s.Workers, s.Chunk)
	default:
		fmt.Fprintf(&b, " from %d to %d", s.From, s.To)
	}
	if s.Drive.Mode != "" {
		fmt.Fprintf(&b, " %v", s.Drive)
	}
	fmt.Fprintf(&b, " watch %d speed %d on-error %s manual %v; guests %d busy %v; end %s after %d", s.Watch, s.Speed, s.OnError, s.Manual, s.Guests, s.Busy, s.End, s.After)
	if s.Fault != "" {
		fmt.Fprintf(&b, "; I/O %d+%d of %s: %v", s.Skip, s.Count, s.Fault, s.Err)
	}
	if s.Real {
		b.WriteString("; files of the host")
	}
	if s.Huge {
		fmt.Fprintf(&b, "; data around %v", s.Places)
	}
	if s.Kill > 0 {
		fmt.Fprintf(&b, "; killed at write %d", s.Kill)
	}
	return b.String()
}

const (
	most     = 6 << 20 // bytes of a disk
	busySize = 8 << 20 // of one that many guests write to
)

// Draw makes the sample of a seed.
func Draw(seed uint64) Sample {
	r := rand.New(rand.NewPCG(seed, 0x6765))
	s := Sample{Seed: seed, Kind: trial.Pick(r, "mirror", "mirror", "mirror", "backup", "backup", "backup", "stream", "commit", "active", "active")}
	s.Real = trial.One(r, 10)
	depth := 1 + r.IntN(3)
	switch s.Kind {
	case "commit":
		depth = 3
	case "active", "stream":
		depth = 2 + r.IntN(2)
	}
	s.Granularity = trial.Pick[int64](r, 0, 0, 512, 1024, 4096, 65536, 1<<20, 2<<20, 8<<20, 64<<20)
	size := drawSize(r, s.Granularity)
	for i := range depth {
		s.Layers = append(s.Layers, s.drawLayer(r, size, i == depth-1 && (depth == 1 || trial.One(r, 4))))
		switch below := &size; r.IntN(4) {
		case 0:
			*below = r.Int64N(size+1) / 512 * 512
		case 1:
			*below = min(size+512*r.Int64N(1+size/512), most)
		}
	}
	if trial.One(r, 3) {
		s.Speed = 1 + r.Int64N(4<<20)
	}
	s.OnError = trial.Pick(r, types.BlockdevOnErrorReport, types.BlockdevOnErrorReport, types.BlockdevOnErrorStop,
		types.BlockdevOnErrorIgnore, types.BlockdevOnErrorEnospc)
	s.Manual = trial.One(r, 4)
	if trial.One(r, 2) && !s.Layers[0].Raw {
		s.Watch = 512 << r.IntN(15)
	}
	s.Guests = trial.Pick(r, 0, 1, 1, 1)
	s.End = "success"
	if trial.One(r, 6) {
		s.End, s.After = "cancel", r.IntN(20)
	}
	s.drawKind(r)
	s.drawFault(r)
	if h := rand.New(rand.NewPCG(seed, 0x68756765)); !s.Busy && trial.One(h, 8) {
		s.makeHuge(h)
	}
	if d := rand.New(rand.NewPCG(seed, 0x6472697665)); (s.Kind == "mirror" || s.Kind == "backup") && trial.One(d, 6) {
		s.drawDrive(d)
	}
	if s.Huge {
		s.modernize()
	}
	return s
}

// drawKind draws what depends on the kind of job.
func (s *Sample) drawKind(r *rand.Rand) {
	switch s.Kind {
	case "mirror":
		s.drawMirror(r)
	case "backup":
		s.drawBackup(r)
	case "commit":
		s.From, s.To = 1, 2
	case "active":
		s.From, s.To = 0, 1+r.IntN(len(s.Layers)-1)
		s.Layers[s.To].Size = min(s.Layers[s.To].Size, s.Layers[0].Size) // else there is a tail that nobody defines
	case "stream":
		s.From, s.To = 0, 1+r.IntN(len(s.Layers))
	}
	if s.Kind == "mirror" || s.Kind == "active" {
		if trial.One(r, 4) && s.Guests == 1 {
			s.Guests = 2
		}
		if s.End == "success" && trial.One(r, 4) {
			s.End = "leave" // ready, and not completed
		}
		if trial.One(r, 12) && s.Guests == 1 && s.End == "success" {
			s.Busy, s.Guests = true, 4
			s.Layers[0].Size, s.Target.Size = busySize, busySize
			s.Speed, s.Manual = 0, false
		}
	}
	if s.Kind == "mirror" && s.Sync == types.MirrorSyncModeNone && s.End == "success" {
		s.End = "leave"
	}
}

func drawSize(r *rand.Rand, granularity int64) int64 {
	unit := trial.Pick(r, 512, 4096, 65536, 256<<10, max(granularity, 512))
	n := unit * int64(r.IntN(12))
	switch r.IntN(6) {
	case 0:
		n = unit * int64(r.IntN(2))
	case 1, 2:
		n += 512 * r.Int64N(unit/512)
	}
	if n > most {
		n = r.Int64N(most/512) * 512
	}
	return n
}

func (s *Sample) drawLayer(r *rand.Rand, size int64, raw bool) Layer {
	l := Layer{Size: size, Fill: r.IntN(12), Discard: r.IntN(3) != 0}
	if l.Detect = trial.Pick(r, "off", "off", "off", "on", "unmap"); l.Detect == "unmap" {
		l.Discard = true
	}
	if raw {
		l.Raw = true
		if s.Real && trial.One(r, 2) {
			l.Size += r.Int64N(512)
		}
		return l
	}
	l.Cluster = trial.Pick(r, 512, 512, 1024, 4096, 4096, 16384, 65536, 65536, 65536, 1<<20, 2<<20)
	l.V2, l.Bits = trial.One(r, 4), 16
	if !l.V2 {
		l.Bits = trial.Pick[int64](r, 1, 4, 16, 16, 64)
		l.Zstd = trial.One(r, 4)
	}
	l.Prealloc = trial.One(r, 10)
	return l
}

// drawTarget makes a target that fits.
func (s *Sample) drawTarget(r *rand.Rand) {
	top := s.Layers[0]
	s.Target = s.drawLayer(r, top.Size, trial.One(r, 4))
	s.Target.Size = top.Size
	if top.Size%512 != 0 && !s.Target.Raw {
		s.Target.Raw = true
	}
	if trial.One(r, 2) {
		s.Target.Fill = 0
	}
	if trial.One(r, 40) {
		s.Target.Size += 512 * (1 + r.Int64N(100)) // it does not fit
		s.Sync, s.Under = types.MirrorSyncModeFull, ""
		return
	}
	s.Sync = types.MirrorSyncModeFull
	switch {
	case !s.Target.Raw && len(s.Layers) > 1 && trial.One(r, 3):
		s.Sync, s.Under, s.Target.Fill, s.Target.Prealloc = types.MirrorSyncModeTop, "chain", 0, false
	case !s.Target.Raw && trial.One(r, 4):
		s.Under = "own"
	}
}

func (s *Sample) drawMirror(r *rand.Rand) {
	s.drawTarget(r)
	if s.Under == "chain" && trial.One(r, 2) {
		s.Under = "header"
	}
	if s.Under == "" && trial.One(r, 10) {
		s.Sync, s.Target.Size = types.MirrorSyncModeNone, s.Layers[0].Size
	}
	s.Mode = trial.Pick(r, types.MirrorCopyModeBackground, types.MirrorCopyModeBackground,
		types.MirrorCopyModeWriteBlocking)
	s.Switch = trial.One(r, 5)
	s.BufSize = trial.Pick[int64](r, 0, 0, 512, 65536, 1<<20, 64<<20)
}

func (s *Sample) drawBackup(r *rand.Rand) {
	s.drawTarget(r)
	if s.Layers[0].Size%512 != 0 && trial.One(r, 2) {
		s.Target.Size = (s.Layers[0].Size + 511) / 512 * 512 // fits, too
	}
	if s.Compress = !s.Target.Raw && s.Under != "own" && trial.One(r, 4); s.Compress {
		s.Target.Fill, s.Target.Prealloc = 0, false // what is there already cannot be compressed
	}
	s.Memory = trial.One(r, 3)
	s.Workers = trial.Pick[int64](r, 0, 0, 1, 2, 7, 100)
	s.Chunk = trial.Pick[int64](r, 0, 0, 65536, 100000, 1<<20, 4<<20, 64<<20)
	if s.Chunk > 0 {
		s.Chunk = max(s.Chunk, int64(s.Target.Cluster))
	}
	if s.Target.Size/512 > (s.Layers[0].Size+511)/512 {
		return
	}
	switch r.IntN(8) {
	case 0, 1, 2, 3:
		s.Bitmap = 512 << r.IntN(23) // 512 B to 2 GiB
		s.BitmapMode = trial.Pick(r, types.BitmapSyncModeNever, types.BitmapSyncModeOnSuccess,
			types.BitmapSyncModeAlways, types.BitmapSyncModeAlways)
		if s.BitmapMode == types.BitmapSyncModeNever || trial.One(r, 2) {
			s.Sync = types.MirrorSyncModeBitmap
		} else if s.BitmapMode == types.BitmapSyncModeOnSuccess && trial.One(r, 2) {
			s.Sync = types.MirrorSyncModeIncremental
		}
	case 4:
		s.Sync, s.Under = types.MirrorSyncModeNone, ""
		s.End, s.After = "cancel", r.IntN(20)
	}
}

func (s *Sample) drawFault(r *rand.Rand) {
	switch {
	case s.Busy, s.Real:
	case trial.One(r, 4):
		s.Fault = trial.Pick(r, "l0", "t", "t")
		if s.Target.Cluster == 0 && !s.Target.Raw {
			s.Fault = trial.Pick(r, "l0", fmt.Sprintf("l%d", len(s.Layers)-1))
		}
		s.Skip, s.Count, s.Err = r.IntN(4<<r.IntN(6)), 1+r.IntN(2), trial.Pick(r, syscall.EIO, syscall.ENOSPC)
		if s.OnError == types.BlockdevOnErrorReport && trial.One(r, 2) {
			s.Count = 0
		}
	case trial.One(r, 8) && s.Sync != types.MirrorSyncModeNone:
		s.Kill, s.Guests = 1+r.IntN(4<<r.IntN(7)), 0
		s.End, s.OnError = "success", types.BlockdevOnErrorReport
	}
}

const (
	hugest     = 1 << 40  // bytes of a disk
	windowSize = 24 << 10 // of one of its parts with data
)

// makeHuge lets the disks grow, those of the same size alike.
func (s *Sample) makeHuge(r *rand.Rand) {
	s.Huge, s.Speed = true, 0
	sizes := map[int64]int64{}
	unit := max(s.Granularity, s.Bitmap, 1<<20)
	edges := []int64{1 << 31, 1 << 32, unit, unit * (1 + r.Int64N(64)), hugest}
	grow := func(l *Layer) {
		if l.Cluster > 0 {
			l.Cluster, l.Prealloc = max(l.Cluster, 65536), false
		}
		if sizes[l.Size] == 0 {
			n := trial.Pick(r, edges...) + 512*(r.Int64N(257)-128)
			if r.IntN(3) == 0 {
				n = hugest - 512*r.Int64N(1<<20)
			}
			sizes[l.Size] = min(max(n, 1<<20), hugest)
			s.Places = append(s.Places, sizes[l.Size])
		}
		l.Size = sizes[l.Size]
	}
	for i := range s.Layers {
		grow(&s.Layers[i])
	}
	if s.Kind == "mirror" || s.Kind == "backup" {
		grow(&s.Target)
		if s.Chunk > 0 {
			s.Chunk = max(s.Chunk, int64(s.Target.Cluster))
		}
	}
	if s.Kind == "active" {
		s.Layers[s.To].Size = min(s.Layers[s.To].Size, s.Layers[0].Size)
	}
	s.Places = append(s.Places, 0)
	for range 1 + r.IntN(4) {
		s.Places = append(s.Places, trial.Pick(r, edges...))
	}
}

// modernize spares a huge disk what takes as many steps as it has clusters or granules. Where there
// is something below an image, all of it may be zeroed: images of version 2 would have to write
// data for that, and a mirror with a small buffer would do it in pieces of a granule (seed 407624:
// 16 million of them), a full backup with a small max-chunk in pieces of that (seed 600914).
func (s *Sample) modernize() {
	for i := range s.Layers[:len(s.Layers)-1] {
		s.Layers[i].V2 = false
	}
	s.Target.V2 = s.Target.V2 && s.Under == ""
	if s.Under != "" && s.BufSize > 0 {
		s.BufSize = 64 << 20
	}
	if s.Under != "" && s.Sync == types.MirrorSyncModeFull && s.Chunk > 0 {
		s.Chunk = 64 << 20
	}
}

// space is where the sample's disks have data.
func (s Sample) space() space {
	if !s.Huge {
		return nil
	}
	size := int64(0)
	for _, l := range append(slices.Clone(s.Layers), s.Target) {
		size = max(size, blk.AlignUp(l.Size, 512))
	}
	return newSpace(slices.Clone(s.Places), windowSize, size)
}
