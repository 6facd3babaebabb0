package graph

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/graph/bitmap"
	"qblockd/graph/blk"
)

// Bitmaps are the dirty bitmaps of a node. Writes look at recording only, which is nil for most
// nodes.
type Bitmaps struct {
	n         *Node
	recording atomic.Pointer[bitmap.Group] // what writes set: the bitmaps that record; nil if there are none
	count     atomic.Int32                 // len(all)

	mu sync.Mutex
	// newest first
	all []*DirtyBitmap // +checklocks:mu
	// as the recorder knows them
	told bitmapStates // +checklocks:mu
}

// Bitmaps are n's dirty bitmaps.
func (n *Node) Bitmaps() *Bitmaps { return &n.bitmaps }

// DirtyBitmapSpec describes a new bitmap.
type DirtyBitmapSpec struct {
	Name        string // "": a job's own; it is listed, but cannot be found
	Granularity int64  // bytes; 0: DefaultGranularity
	Disabled    bool
	// Persistent: the driver stores it in the image. Inconsistent: it was not stored when it should
	// have been.
	Persistent, Inconsistent bool
	// ReadOnly: it must not change, as the image cannot be written to.
	ReadOnly bool
	// Bits is what it shows, instead of an empty bitmap of the node's size: for nodes that have no
	// size yet.
	Bits *bitmap.Bitmap
}

// Limits of bitmaps, as in QEMU.
const (
	MinGranularity    = 512
	maxBitmapName     = 1023
	coarsestByDefault = 64 << 10
	finestByDefault   = 4 << 10
)

// maxRecorded is what the bitmaps of a node that record may take together, in bytes: one of 512 TiB
// at 64 KiB, or of 4 TiB at 512 bytes, with something set everywhere. Each has an equal share. When
// one has come to that, writes to further parts of the disk set 4096 granules or more at once.
const maxRecorded = 1 << 30

// DefaultGranularity is the image's cluster size, held between 4 and 64 KiB; 64 KiB where there is
// none. In bytes.
func (s *Bitmaps) DefaultGranularity() int64 {
	c := s.n.Caps().Limits.ClusterSize
	if c == 0 {
		return coarsestByDefault
	}
	return min(max(c, finestByDefault), coarsestByDefault)
}

// New makes an empty bitmap. Errors: the name is taken or too long.
func (s *Bitmaps) New(spec DirtyBitmapSpec) (*DirtyBitmap, error) {
	l, err := s.NewAll([]DirtyBitmapSpec{spec})
	if err != nil {
		return nil, err
	}
	return l[0], nil
}

// NewAll makes several at once, the last of which is the newest; all or none. What it costs is
// linear.
func (s *Bitmaps) NewAll(specs []DirtyBitmapSpec) ([]*DirtyBitmap, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := make(map[string]bool, len(s.all))
	for _, d := range s.all {
		taken[d.name] = true
	}
	l := make([]*DirtyBitmap, len(specs))
	for i, x := range specs {
		switch {
		case x.Name != "" && taken[x.Name]:
			return nil, fmt.Errorf("Bitmap already exists: %s", x.Name)
		case len(x.Name) > maxBitmapName:
			return nil, fmt.Errorf("Bitmap name too long: %s", x.Name)
		}
		taken[x.Name] = true
		if x.Granularity == 0 {
			x.Granularity = s.DefaultGranularity()
		}
		if x.Bits == nil {
			x.Bits = bitmap.New(s.size(), x.Granularity)
		}
		l[i] = &DirtyBitmap{of: s, name: x.Name, bits: x.Bits, disabled: x.Disabled, persistent: x.Persistent,
			inconsistent: x.Inconsistent, readOnly: x.ReadOnly}
	}
	all := slices.Clone(l)
	slices.Reverse(all)
	s.all = append(all, s.all...)
	s.changedLocked()
	return l, nil
}

// size is the size that the bitmaps have: whole sectors.
func (s *Bitmaps) size() int64 { return blk.AlignUp(s.n.Size(), blk.SectorSize) }

// Find is the bitmap of that name, or nil.
func (s *Bitmaps) Find(name string) *DirtyBitmap {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.all {
		if d.name == name && name != "" {
			return d
		}
	}
	return nil
}

// FindDirtyBitmap finds a bitmap by its node's name and its own. The errors have QEMU's words.
func (g *Graph) FindDirtyBitmap(node, name string) (*DirtyBitmap, error) {
	return findDirtyBitmap(g.Node(node), node, name)
}

// FindDirtyBitmap is that of the Graph once the Tx is committed, on a node that is Held.
func (tx *Tx) FindDirtyBitmap(node, name string) (*DirtyBitmap, error) {
	return findDirtyBitmap(tx.Held(node), node, name)
}

func findDirtyBitmap(n *Node, node, name string) (*DirtyBitmap, error) {
	if n == nil {
		return nil, fmt.Errorf("Node '%s' not found", node)
	}
	if d := n.bitmaps.Find(name); d != nil {
		return d, nil
	}
	return nil, fmt.Errorf("Dirty bitmap '%s' not found", name)
}

// All are all bitmaps, newest first, those of jobs as well.
func (s *Bitmaps) All() []*DirtyBitmap {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.all)
}

// SetReadOnly changes whether the persistent bitmaps must not change.
func (s *Bitmaps) SetReadOnly(ro bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.all {
		if d.persistent {
			d.readOnly = ro
		}
	}
	s.changedLocked()
}

// changedLocked makes the list that writes look at anew.
// +checklocks:s.mu
func (s *Bitmaps) changedLocked() {
	s.count.Store(int32(len(s.all)))
	var l []*bitmap.Bitmap
	for _, d := range s.all {
		if d.successor == nil && !d.disabled && !d.inconsistent && !d.readOnly {
			l = append(append(l, d.bits), d.since...)
		}
	}
	if l == nil {
		s.recording.Store(nil)
		return
	}
	for _, b := range l {
		b.SetLimit(maxRecorded / int64(len(l)))
	}
	s.recording.Store(bitmap.NewGroup(l))
}

// +checklocks:s.mu
func (s *Bitmaps) removeLocked(d *DirtyBitmap) {
	if i := slices.Index(s.all, d); i >= 0 {
		s.all = slices.Delete(s.all, i, i+1)
	}
}

// written records a write of r. It runs while the request is still tracked.
func (s *Bitmaps) written(r *blk.Req, off, size int64) {
	if g := s.recording.Load(); g != nil && !g.Has(off, size) {
		g.Set(off, size, r.Unrecorded)
	}
}

// resize gives the bitmaps the size that the node has. What is new is clean.
func (s *Bitmaps) resize() {
	if s.count.Load() == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	size := s.size()
	for _, d := range s.all {
		for _, b := range append(d.since, d.bits) {
			if b.Size() != size {
				b.Resize(size)
			}
		}
	}
}

// BitmapState is what is shown of a bitmap.
type BitmapState struct {
	Name                                      string
	Count, Granularity                        int64 // bytes
	Recording, Busy, Persistent, Inconsistent bool
}

// States are the states of all bitmaps, newest first; nil if there are none.
func (s *Bitmaps) States() (l []BitmapState) {
	if s.count.Load() == 0 {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range s.all {
		l = append(l, BitmapState{
			Name: d.name, Count: d.bits.Count(), Granularity: d.bits.Granularity(),
			Recording: !d.disabled, Busy: d.busy, Persistent: d.persistent, Inconsistent: d.inconsistent,
		})
	}
	return l
}
