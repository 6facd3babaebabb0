package crash

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"sync"
)

const sector = 512

// ledger knows for each sector what a crash may leave there: what was flushed, and all that was
// written since. All methods may be called from any goroutine; each sector has one writer.
type ledger struct {
	mu   sync.Mutex
	next uint64
	cur  []uint64   // written last
	may  [][]uint64 // flushed, and written since
}

// newLedger begins with what value gives for each sector.
func newLedger(sectors int, value func(i int) uint64) *ledger {
	l := &ledger{next: 1, cur: make([]uint64, sectors), may: make([][]uint64, sectors)}
	for i := range l.cur {
		l.cur[i] = value(i)
		l.may[i] = []uint64{l.cur[i]}
	}
	return l
}

// stamp fills a sector with a value; 0 makes zeroes.
func stamp(p []byte, v uint64) {
	for k := 0; k < sector; k += 8 {
		binary.LittleEndian.PutUint64(p[k:], v)
	}
}

// mark gives n sectors new values, which are about to be written, and returns their bytes.
func (l *ledger) mark(first, n int) []byte {
	p := make([]byte, n*sector)
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := range n {
		l.set(first+i, l.next)
		stamp(p[i*sector:], l.next)
		l.next++
	}
	return p
}

// zero is mark for zeroes.
func (l *ledger) zero(first, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := first; i < first+n; i++ {
		l.set(i, 0)
	}
}

func (l *ledger) set(i int, v uint64) {
	l.cur[i] = v
	l.may[i] = append(l.may[i], v)
}

// flushed is called when a flush was acknowledged that was sent when all writes to these sectors
// had been.
func (l *ledger) flushed(first, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i := first; i < first+n; i++ {
		l.may[i] = append(l.may[i][:0], l.cur[i])
	}
}

// snapshot is what the ledger knows now.
func (l *ledger) snapshot() *ledger {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := &ledger{cur: slices.Clone(l.cur), may: make([][]uint64, len(l.may))}
	for i := range l.may {
		c.may[i] = slices.Clone(l.may[i])
	}
	return c
}

// verify checks that p, what a guest reads, holds only what it may.
func (l *ledger) verify(p []byte) error {
	bad := map[int]string{}
	for i := range l.may {
		b := p[i*sector : (i+1)*sector]
		v := binary.LittleEndian.Uint64(b)
		ok := slices.Contains(l.may[i], v)
		for k := 8; k < sector && ok; k += 8 {
			ok = binary.LittleEndian.Uint64(b[k:]) == v
		}
		if !ok {
			bad[i] = fmt.Sprintf("sector %d begins with %#x, may be %#x", i, v, l.may[i])
		}
	}
	if len(bad) == 0 {
		return nil
	}
	return fmt.Errorf("%d sectors are lost or torn; %s", len(bad), bad[slices.Min(slices.Collect(maps.Keys(bad)))])
}
