package blk

// HostRange is a run of bytes of a host file. FD -1 means that the run reads as zeroes.
type HostRange struct {
	FD     int
	Off, N int64
	// Direct: the descriptor is one of O_DIRECT, and the kernel reads the run from the disk each time.
	Direct bool
}

// Lease is something that a mapping keeps alive or in place (an open file, a host cluster
// that must not be reused) until the mapping is released.
type Lease interface{ Release() }

// Mapping is the answer of Map: the host files and offsets behind a range, valid until
// Release. It is never cached and may be reused after Release. The zero value is empty.
type Mapping struct {
	Ranges []HostRange
	leases []Lease
}

// N is the number of bytes mapped, counted from the offset asked.
func (m *Mapping) N() int64 { return Total(m.Ranges) }

// Total is the number of bytes of rs.
func Total(rs []HostRange) (n int64) {
	for i := range rs {
		n += rs[i].N
	}
	return n
}

// Add appends a run, joined with the previous one where they touch.
func (m *Mapping) Add(h HostRange) {
	if k := len(m.Ranges) - 1; k >= 0 {
		p := &m.Ranges[k]
		if p.FD == h.FD && (h.FD < 0 || p.Off+p.N == h.Off) {
			p.N += h.N
			return
		}
	}
	m.Ranges = append(m.Ranges, h)
}

// Hold adds a lease that Release ends.
func (m *Mapping) Hold(l Lease) { m.leases = append(m.leases, l) }

// Release ends the leases and empties the mapping for reuse. Never blocks.
func (m *Mapping) Release() {
	for i, l := range m.leases {
		l.Release()
		m.leases[i] = nil
	}
	m.leases, m.Ranges = m.leases[:0], m.Ranges[:0]
}
