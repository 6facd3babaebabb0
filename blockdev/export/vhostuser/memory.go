package vhostuser

import (
	"errors"
	"math"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"qblockd/blockdev/vhostwire"
	"qblockd/blockdev/virtio"
)

// maxSlots is how many regions of memory there may be, as with QEMU.
const maxSlots = 509

// memory is a guest's memory as the front end has told it: regions that are mapped. It belongs to
// the message loop; who uses table takes a reference of it.
type memory struct {
	table *virtio.Memory // nil: none yet
}

// mapRegion maps a region and closes fd. The mapping has one reference, the caller's.
func mapRegion(r vhostwire.Region, fd int) (virtio.Region, error) {
	defer unix.Close(fd)
	if r.Size == 0 || r.Size > math.MaxInt64-r.Offset || r.Offset > math.MaxInt64 {
		return virtio.Region{}, errors.New("a memory region is empty, or too large")
	}
	// From the beginning of the file, as the offset need not be one that mmap takes: huge pages.
	b, err := unix.Mmap(fd, 0, int(r.Offset+r.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return virtio.Region{}, err
	}
	m, err := virtio.NewShared(b, pageSize(fd), func(b []byte) { unix.Munmap(b) })
	if err != nil {
		unix.Munmap(b)
		return virtio.Region{}, err
	}
	return virtio.Region{Guest: r.Guest, User: r.User, Size: r.Size, Offset: r.Offset, Mapping: m}, nil
}

// pageSize is the size in bytes of the pages that fd is mapped with: huge ones say so.
func pageSize(fd int) int {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err == nil && st.Type == unix.HUGETLBFS_MAGIC {
		return int(st.Bsize)
	}
	return os.Getpagesize()
}

// replace makes a table of these regions, whose descriptors are fds, in their order.
func (m *memory) replace(regions []vhostwire.Region, fds *descriptors) error {
	var list []virtio.Region
	defer func() {
		for _, r := range list {
			r.Mapping.Release() // the table has its own references
		}
	}()
	for _, r := range regions {
		v, err := mapRegion(r, fds.take())
		if err != nil {
			return err
		}
		list = append(list, v)
	}
	table, err := virtio.NewMemory(list)
	if err != nil {
		return err
	}
	m.install(table)
	return nil
}

// add adds a region.
func (m *memory) add(r vhostwire.Region, fd int) error {
	v, err := mapRegion(r, fd)
	if err != nil {
		return err
	}
	defer v.Mapping.Release()
	var table *virtio.Memory
	switch {
	case m.table == nil:
		table, err = virtio.NewMemory([]virtio.Region{v})
	case m.table.Regions() >= maxSlots:
		return errors.New("too many memory regions")
	default:
		table, err = m.table.With(v)
	}
	if err != nil {
		return err
	}
	m.install(table)
	return nil
}

// remove removes a region.
func (m *memory) remove(r vhostwire.Region) error {
	if m.table == nil {
		return errors.New("there are no memory regions")
	}
	table, err := m.table.Without(r.Guest, r.User, r.Size)
	if err != nil {
		return err
	}
	m.install(table)
	return nil
}

func (m *memory) install(table *virtio.Memory) {
	m.close()
	m.table = table
}

func (m *memory) close() {
	if m.table != nil {
		m.table.Release()
		m.table = nil
	}
}

// backChannel is where a back end tells the front end something by itself.
type backChannel struct {
	mu sync.Mutex
	fd int // +checklocks:mu
}

// set makes fd the channel; -1: none.
func (c *backChannel) set(fd int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd >= 0 {
		unix.Close(c.fd)
	}
	c.fd = fd
}

func (c *backChannel) close() { c.set(-1) }

// configChanged tells that the configuration space has changed. It does not wait: a front end that
// takes no messages misses this one.
func (c *backChannel) configChanged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return
	}
	b := vhostwire.AppendHeader(nil, vhostwire.BackendConfigChange, 0, 0)
	unix.SendmsgN(c.fd, b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
}
