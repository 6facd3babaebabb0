package qcow2

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// mem is a drivertest driver as the file of an image, without a graph in between.
type mem struct {
	drv interface {
		Caps() graph.Caps
		Size() int64
		ReadAt(*blk.Req, blk.Vec, int64, blk.Flags) error
		WriteAt(*blk.Req, blk.Vec, int64, blk.Flags) error
		Zero(*blk.Req, int64, int64, blk.Flags) error
		Discard(*blk.Req, int64, int64) error
		Flush(*blk.Req) error
		Status(*blk.Req, int64, int64) (blk.Extent, error)
		Resize(context.Context, int64, blk.Prealloc) error
	}
}

func (m mem) Size() int64 { return m.drv.Size() }

func (m mem) Caps() graph.Caps { return m.drv.Caps() }
func (m mem) ReadAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return m.drv.ReadAt(r, v, off, f)
}
func (m mem) WriteAt(r *blk.Req, v blk.Vec, off int64, f blk.Flags) error {
	return m.drv.WriteAt(r, v, off, f)
}
func (m mem) Zero(r *blk.Req, off, n int64, f blk.Flags) error { return m.drv.Zero(r, off, n, f) }
func (m mem) Discard(r *blk.Req, off, n int64) error           { return m.drv.Discard(r, off, n) }
func (m mem) Flush(r *blk.Req) error                           { return m.drv.Flush(r) }
func (m mem) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return m.drv.Status(r, off, n)
}
func (m mem) Map(r *blk.Req, off, n int64, mp *blk.Mapping) error { return nil }
func (m mem) CopyFrom(r *blk.Req, off int64, src []blk.HostRange, f blk.Flags) error {
	return blk.ErrNotSupported
}
func (m mem) Resize(ctx context.Context, size int64, exact bool, p blk.Prealloc) error {
	return m.drv.Resize(ctx, size, blk.PreallocOff) // memory knows no other
}

func req() *blk.Req { return &blk.Req{Ctx: context.Background()} }

// Options are those that the driver takes.
type Options = types.BlockdevOptionsQcow2

// checks are options that say which overlap checks are made.
func checks(mode types.Qcow2OverlapCheckMode) Options {
	return Options{OverlapCheck: &types.Qcow2OverlapChecks{Mode: &mode}}
}

// CreateOptions are those of the schema, easier to write; nil and "" mean not given.
type CreateOptions struct {
	Size            uint64 // bytes
	Version         string // "v2", "v3"
	BackingFile     *string
	BackingFormat   *string
	ClusterSize     *uint64
	Preallocation   blk.Prealloc
	LazyRefcounts   bool
	RefcountBits    *int64
	CompressionType string // "zlib", "zstd"
	// Data is to have the data, called "data" by the header; Raw: it shows the disk by itself.
	Data *drivertest.MemFile
	Raw  bool
	// Extended: with subclusters.
	Extended bool
	// Crypt is "luks", "aes", or ""; the password is "key".
	Crypt string
}

func (o CreateOptions) dataName() string {
	if o.Data != nil {
		return "data"
	}
	return ""
}

func (o CreateOptions) schema() *types.BlockdevCreateOptionsQcow2 {
	x := &types.BlockdevCreateOptionsQcow2{
		Size: o.Size, BackingFile: o.BackingFile, ClusterSize: o.ClusterSize, RefcountBits: o.RefcountBits,
		BackingFmt: (*types.BlockdevDriver)(o.BackingFormat), LazyRefcounts: &o.LazyRefcounts,
	}
	if o.Data != nil {
		x.DataFile, x.DataFileRaw = &types.BlockdevRef{Reference: ptr("data")}, &o.Raw
	}
	if o.Extended {
		x.ExtendedL2 = &o.Extended
	}
	x.Encrypt = newKeys(o.Crypt)
	if o.Version != "" {
		x.Version = ptr(types.BlockdevQcow2Version(o.Version))
	}
	if o.Preallocation != "" {
		x.Preallocation = ptr(types.PreallocMode(o.Preallocation))
	}
	if o.CompressionType != "" {
		x.CompressionType = ptr(types.Qcow2CompressionType(o.CompressionType))
	}
	return x
}

// quiet starts no timer; smallCaches are the smallest there can be.
var (
	quiet       = Options{CacheCleanInterval: ptr(int64(0))}
	smallCaches = Options{L2CacheSize: ptr(int64(1)), L2CacheEntrySize: ptr(int64(512))}
)

func ptr[T any](v T) *T { return &v }

// mustCreate makes an image in a new memory file.
func mustCreate(t testing.TB, o CreateOptions) *drivertest.MemFile {
	t.Helper()
	f := drivertest.NewMemFile(0)
	var data file
	if o.Data != nil {
		data = mem{o.Data}
	}
	if err := createWith(req(), mem{f}, data, o.dataName(), o.schema(), words); err != nil {
		t.Fatalf("create: %v", err)
	}
	return f
}

func mustOpen(t testing.TB, f file, c config) *image {
	t.Helper()
	c.file = f
	if c.options.CacheCleanInterval == nil {
		c.options.CacheCleanInterval = ptr(int64(0))
	}
	s, err := openImage(req(), keyed(c))
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	return s
}

func mustClose(t testing.TB, s *image) {
	t.Helper()
	if err := s.Inactivate(req()); err != nil {
		t.Fatalf("inactivate: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatalf("close: %v", err)
	}
}

// sound fails unless the image has no corruption, and no leaks if leaks is false.
func sound(t testing.TB, s *image, leaks bool) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	// What waits for a flush to be freed is still counted: neither is it a leak.
	s.reap(req(), len(s.quarantine.pending) == 0)
	res, err := s.check(req(), false)
	if err != nil {
		t.Fatalf("check: %v", err)
	}
	leaks = leaks || len(s.quarantine.pending)+len(s.quarantine.limbo) > 0
	if res.Corruptions > 0 || res.Errors > 0 || res.Leaks > 0 && !leaks {
		t.Fatalf("check: %+v", *res)
	}
}

// tool skips the test loudly if an outside program is missing.
func tool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("SKIPPED: %s is not installed, so nothing was compared with it", name)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	tool(t, name)
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func fill(r *rand.Rand, b []byte) {
	for len(b) >= 8 {
		be.PutUint64(b, r.Uint64())
		b = b[8:]
	}
	for i := range b {
		b[i] = byte(r.Uint32())
	}
}

func desc(v any) string { return fmt.Sprintf("%+v", v) }

// parts are what an image has in memory, for tests to look at.
type parts struct {
	hdr        *layout.Header
	ext        *layout.Extensions
	l1         *entries
	reft       []uint64
	snaps      []layout.Snapshot
	stored     []*stored
	survey     *survey
	limbo      []freed
	slice      int64
	flagsDue   bool
	badBitmaps bool
}

func peek(s *image) parts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return parts{
		s.hdr, s.ext, &s.l1, s.reft, s.snaps, s.stored, s.survey, s.quarantine.limbo, s.slice, s.flagsDue, s.badBitmaps,
	}
}

// count counts all but what L2 tables refer to, within most bytes.
func count(s *image, most int64, all bool) (*counter, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.newCounter(req(), &CheckResult{})
	c.all, c.most = all, most
	return c, s.countMeta(c)
}

// surveyTooLarge makes s be as an image that is too large for a survey.
func surveyTooLarge(s *image, found int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endSurvey()
	s.survey = &survey{endless: true, found: found}
}

// atSnapshot is the image of s with the contents of snapshot sn.
func atSnapshot(t testing.TB, s *image, sn *layout.Snapshot) *image {
	t.Helper()
	c := s.config
	c.readOnly, c.keeper = true, nil
	view, err := openImage(req(), c)
	if err != nil {
		t.Fatal(err)
	}
	view.mu.Lock()
	defer view.mu.Unlock()
	if view.l1, err = view.readTable(req(), int64(sn.L1TableOffset), int64(sn.L1Size)); err != nil {
		t.Fatal(err)
	}
	return view
}

// setCaches makes the caches of s hold so many tables, so that some are evicted.
func setCaches(s *image, l2, rb int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.l2.max, s.rb.max = l2, rb
}
