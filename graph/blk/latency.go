package blk

import (
	"sync/atomic"
	"time"
)

// Latency decides whether a node's writes are short enough to be made by a goroutine that
// must not wait. The rule: yes, while the running mean of the latest writes (each counts an
// eighth) is below LatencyMean, and after one that took LatencyLong or longer only when
// LatencyCalm writes in a row have been shorter than that. A node that has not been measured yet
// gets the benefit of the doubt for a few writes, so that it is measured. All methods may be called
// from many goroutines at once; observations that collide may be lost, which is harmless.
type Latency struct {
	mean  atomic.Int64 // running mean, ns
	penal atomic.Int64 // writes that must still be short before the answer can be yes
}

// The constants of the rule that Latency states. A buffered write of 4 KiB takes a few µs;
// one that has to wait for write-back takes many ms.
const (
	LatencyMean = 50 * time.Microsecond
	LatencyLong = 500 * time.Microsecond
	LatencyCalm = 32
)

// Observe records that a write took d.
func (l *Latency) Observe(d time.Duration) {
	m := l.mean.Load()
	l.mean.Store(m + (int64(d)-m)/8)
	if d >= LatencyLong {
		l.penal.Store(LatencyCalm)
	} else if p := l.penal.Load(); p > 0 {
		l.penal.CompareAndSwap(p, p-1)
	}
}

// Short tells whether the next write may be made inline.
func (l *Latency) Short() bool {
	return l.penal.Load() == 0 && l.mean.Load() < int64(LatencyMean)
}

// Mean is the running mean.
func (l *Latency) Mean() time.Duration { return time.Duration(l.mean.Load()) }
