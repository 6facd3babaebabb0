package rig

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"syscall"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/schema/types"
)

// Store holds files in memory, by name. All methods may be called from any goroutine.
type Store struct {
	mu    sync.Mutex
	files map[string]*drivertest.MemFile
	open  map[string]int // nodes that have a file open
	wrap  func(name string, d graph.Driver) graph.Driver
	fails func(name string) error
}

// NewStore is empty.
func NewStore() *Store {
	return &Store{files: map[string]*drivertest.MemFile{}, open: map[string]int{}}
}

// Put gives m the name.
func (s *Store) Put(name string, m *drivertest.MemFile) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.files[name] = m
}

// Get is the file of that name or nil.
func (s *Store) Get(name string) *drivertest.MemFile {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.files[name]
}

// Remove forgets a file.
func (s *Store) Remove(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.files, name)
}

// Names are those of all files, sorted.
func (s *Store) Names() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.files))
}

// Wrap sets what is put around the driver of each file that is opened from now on, a Fault for
// instance.
func (s *Store) Wrap(f func(name string, d graph.Driver) graph.Driver) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wrap = f
}

// FailOpen sets what is asked before a file is opened.
func (s *Store) FailOpen(f func(name string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails = f
}

// Open is the number of nodes that have files open.
func (s *Store) Open() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, k := range s.open {
		n += k
	}
	return n
}

func (s *Store) left() (errs []error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, n := range s.open {
		if n != 0 {
			errs = append(errs, fmt.Errorf("file %s is open %d times", name, n))
		}
	}
	return errs
}

// Drivers are those of the daemon, but "file" opens what is in s.
func (s *Store) Drivers() []*driver.Any {
	l := slices.Clone(drivers.All)
	for i, d := range l {
		if d.Name == types.BlockdevDriverFile {
			stored := *d
			stored.Open, stored.Reopen = s.openFile, driver.NoChange[any]
			l[i] = &stored
		}
	}
	return l
}

func (s *Store) openFile(_ *driver.Opening, u any) (graph.Driver, error) {
	name := u.(*types.BlockdevOptionsFile).Filename
	s.mu.Lock()
	m, wrap, fails := s.files[name], s.wrap, s.fails
	s.mu.Unlock()
	if fails != nil {
		if err := fails(name); err != nil {
			return nil, fmt.Errorf("Could not open '%s': %w", name, err)
		}
	}
	if m == nil {
		return nil, fmt.Errorf("Could not open '%s': %w", name, syscall.ENOENT)
	}
	s.mu.Lock()
	s.open[name]++
	s.mu.Unlock()
	var d graph.Driver = &opened{MemFile: m, s: s, name: name}
	if wrap != nil {
		d = wrap(name, d)
	}
	return d, nil
}

// opened counts who has a file open.
type opened struct {
	*drivertest.MemFile
	s    *Store
	name string
}

// Close implements graph.Driver.
func (o *opened) Close() error {
	o.s.mu.Lock()
	defer o.s.mu.Unlock()
	o.s.open[o.name]--
	return nil
}
