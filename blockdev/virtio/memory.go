package virtio

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync/atomic"

	"qblockd/blockdev/virtio/vanish"
)

// Mapping is memory of another process that is mapped here. It is unmapped when nobody holds a
// reference any more. Its pointers are not the garbage collector's business, but they
// must not outlive it either: who gives up a reference forgets them.
type Mapping struct {
	bytes []byte
	unmap func([]byte)
	area  *vanish.Area // nil: nobody takes it away
	refs  atomic.Int64
}

// NewShared is NewMapping for memory that others may take away, in pages of so many bytes: it reads
// as zeroes then, see package vanish, and queues that are in it break. Error: that cannot be
// watched for.
func NewShared(bytes []byte, page int, unmap func([]byte)) (*Mapping, error) {
	a, err := vanish.Watch(bytes, page)
	if err != nil {
		return nil, err
	}
	m := NewMapping(bytes, unmap)
	m.area = a
	return m, nil
}

// NewMapping has one reference, the caller's. unmap is called once, by whoever gives up the last
// one, and may not wait for that.
func NewMapping(bytes []byte, unmap func([]byte)) *Mapping {
	m := &Mapping{bytes: bytes, unmap: unmap}
	m.refs.Store(1)
	return m
}

// Release gives up a reference.
func (m *Mapping) Release() {
	switch n := m.refs.Add(-1); {
	case n == 0:
		b := m.bytes
		m.bytes = nil
		if m.area != nil {
			m.area.End()
		}
		m.unmap(b)
	case n < 0:
		panic("virtio: Mapping released too often")
	}
}

// Region says where Size bytes of a mapping, from Offset on, are in the guest: at physical
// address Guest, and at address User of the front end's process, which is how vhost-user names the
// rings.
type Region struct {
	Guest, User, Size, Offset uint64
	Mapping                   *Mapping
}

// regionAlign is what sizes are multiples of, and up to which addresses agree. Rings need it.
const regionAlign = 16

// region is a Region that was checked.
type region struct {
	Region
	bytes []byte
}

// Memory is an immutable table of the guest's memory. It changes by making another one; what uses
// the old one keeps it mapped by its references.
type Memory struct {
	regions []region // by Guest
	refs    atomic.Int64
}

// NewMemory makes a table with one reference, the caller's; it takes references of the mappings.
// Error: what is wrong with a region, or that two overlap; then nothing was taken.
func NewMemory(rs []Region) (*Memory, error) {
	m := &Memory{regions: make([]region, 0, len(rs))}
	for _, r := range rs {
		checked, err := r.check()
		if err != nil {
			return nil, err
		}
		m.regions = append(m.regions, checked)
	}
	if err := m.disjoint("user", func(r region) uint64 { return r.User }); err != nil {
		return nil, err
	}
	if err := m.disjoint("guest", func(r region) uint64 { return r.Guest }); err != nil { // last: the order that stays
		return nil, err
	}
	for _, r := range m.regions {
		r.Mapping.refs.Add(1)
	}
	m.refs.Store(1)
	return m, nil
}

// check refuses regions that overflow, or that are not in their mapping.
func (r Region) check() (region, error) {
	have := uint64(len(r.Mapping.bytes))
	switch {
	case r.Size == 0:
		return region{}, fmt.Errorf("memory region at guest address %#x is empty", r.Guest)
	case r.Guest > math.MaxUint64-r.Size || r.User > math.MaxUint64-r.Size:
		return region{}, fmt.Errorf("memory region at guest address %#x, user address %#x: %d bytes are too many", r.Guest, r.User, r.Size)
	case r.Offset > have || r.Size > have-r.Offset:
		return region{}, fmt.Errorf("memory region at guest address %#x is not in its mapping", r.Guest)
	}
	b := r.Mapping.bytes[r.Offset:][:r.Size:r.Size]
	at := uint64(addr(b))
	if (r.Guest^at)%regionAlign != 0 || (r.User^at)%regionAlign != 0 || r.Size%regionAlign != 0 {
		return region{}, fmt.Errorf("memory region at guest address %#x is not aligned to %d bytes", r.Guest, regionAlign)
	}
	return region{r, b}, nil
}

// disjoint sorts the regions by a kind of address, and refuses those that overlap.
func (m *Memory) disjoint(kind string, at func(region) uint64) error {
	slices.SortFunc(m.regions, func(a, b region) int { return cmp.Compare(at(a), at(b)) })
	for i := 1; i < len(m.regions); i++ {
		if a, b := m.regions[i-1], m.regions[i]; at(b)-at(a) < a.Size {
			return fmt.Errorf("memory regions at %s addresses %#x and %#x overlap", kind, at(a), at(b))
		}
	}
	return nil
}

// With is a new table that has r as well.
func (m *Memory) With(r Region) (*Memory, error) {
	return NewMemory(append(m.list(), r))
}

// Without is a new table that lacks the region of these addresses and this size. Error: there is
// none.
func (m *Memory) Without(guest, user, size uint64) (*Memory, error) {
	rs := m.list()
	i := slices.IndexFunc(rs, func(r Region) bool { return r.Guest == guest && r.User == user && r.Size == size })
	if i < 0 {
		return nil, fmt.Errorf("there is no memory region of %d bytes at guest address %#x, user address %#x", size, guest, user)
	}
	return NewMemory(slices.Delete(rs, i, i+1))
}

// list is the regions as NewMemory takes them.
func (m *Memory) list() []Region {
	rs := make([]Region, 0, len(m.regions)+1)
	for _, r := range m.regions {
		rs = append(rs, r.Region)
	}
	return rs
}

// Regions is the number of regions.
func (m *Memory) Regions() int { return len(m.regions) }

func (m *Memory) hold() { m.refs.Add(1) }

// Release gives up a reference; with the last one the table gives up its mappings.
func (m *Memory) Release() {
	switch n := m.refs.Add(-1); {
	case n == 0:
		for i := range m.regions {
			m.regions[i].bytes = nil
			m.regions[i].Mapping.Release()
		}
	case n < 0:
		panic("virtio: Memory released too often")
	}
}

// gone is ErrFault if any of the memory was taken away.
func (m *Memory) gone() error {
	for i := range m.regions {
		if a := m.regions[i].Mapping.area; a != nil && a.Gone() {
			return fmt.Errorf("%w: below guest address %#x", ErrFault, m.regions[i].Guest)
		}
	}
	return nil
}

// errPieces: a buffer is spread over more regions than any guest has.
var errPieces = errors.New("a buffer lies in too many pieces")

// appendGuest appends the n bytes at the guest's address at to dst, in as many pieces as there are
// regions, which must touch. hint is where the last one was found. dst grows to max pieces at most.
func (m *Memory) appendGuest(dst [][]byte, at, n uint64, hint *int, max int) ([][]byte, error) {
	for n > 0 {
		i := *hint
		if i >= len(m.regions) || at-m.regions[i].Guest >= m.regions[i].Size {
			if i = m.find(at); i < 0 {
				return dst, fmt.Errorf("guest address %#x is in no memory region", at)
			}
			*hint = i
		}
		r := &m.regions[i]
		if len(dst) == max {
			return dst, errPieces
		}
		off := at - r.Guest
		take := min(n, r.Size-off)
		dst = append(dst, r.bytes[off:off+take:off+take])
		at += take // no overflow: regions end below 2^64
		n -= take
	}
	return dst, nil
}

// find is the index of the region that has the guest's address; -1: none.
func (m *Memory) find(at uint64) int {
	i, found := slices.BinarySearchFunc(m.regions, at, func(r region, at uint64) int { return cmp.Compare(r.Guest, at) })
	if !found {
		i--
	}
	if i < 0 || at-m.regions[i].Guest >= m.regions[i].Size {
		return -1
	}
	return i
}

// guestOf is the guest's address of b, a part of a region.
func (m *Memory) guestOf(b []byte) (at uint64, ok bool) {
	for i := range m.regions {
		if off := uint64(addr(b) - addr(m.regions[i].bytes)); off < m.regions[i].Size {
			return m.regions[i].Guest + off, true
		}
	}
	return 0, false
}

// user is the memory of n bytes at an address of the front end's process, which is a multiple of
// align, a power of two up to 16. It begins up to 2 bytes before and ends up to 2 bytes behind, so
// that it consists of whole words of 32 bits; skip is how many were added in front.
func (m *Memory) user(what string, at, n, align uint64) (b []byte, skip int, err error) {
	if at%align != 0 {
		return nil, 0, fmt.Errorf("%s at user address %#x is not aligned to %d bytes", what, at, align)
	}
	for _, r := range m.regions {
		if at < r.User || at-r.User >= r.Size {
			continue
		}
		off := at - r.User
		if n > r.Size-off {
			break
		}
		from, to := off&^3, (off+n+3)&^3 // sizes of regions are multiples of 16
		return r.bytes[from:to:to], int(off - from), nil
	}
	return nil, 0, fmt.Errorf("%s, %d bytes at user address %#x, is not in one memory region", what, n, at)
}
