package qcow2

import (
	"cmp"
	"slices"
)

// table is a cached piece of metadata: an L2 slice or a refcount block, big-endian as on disk.
type table struct {
	off        int64 // in the file
	data       []byte
	dirty      bool
	pins       int    // not evicted while > 0
	gen        uint64 // goes up at each change; tells a flush whether its copy is still the newest
	used       bool   // since the last cleaning
	prev, next *table // LRU list, most recent first
}

// cache holds tables of one size. Memory is taken on first use. There may be more than max while
// everything is dirty or pinned, see room.
type cache struct {
	size   int // bytes of a table
	max    int // tables
	m      map[int64]*table
	lru    table // ring
	ndirty int
	spare  *table // one evicted table for reuse
	epoch  uint64 // goes up when content on disk may have changed, see warm
}

func newCache(size, max int) *cache {
	c := &cache{size: size, max: max, m: map[int64]*table{}}
	c.lru.prev, c.lru.next = &c.lru, &c.lru
	return c
}

func (t *table) unlink() {
	t.prev.next, t.next.prev = t.next, t.prev
}

func (c *cache) toFront(t *table) {
	t.prev, t.next = &c.lru, c.lru.next
	t.prev.next, t.next.prev = t, t
}

// get returns the table at off if it is cached.
func (c *cache) get(off int64) *table {
	t := c.m[off]
	if t != nil {
		t.used = true
		if c.lru.next != t {
			t.unlink()
			c.toFront(t)
		}
	}
	return t
}

// full tells whether the next insertion needs a victim.
func (c *cache) full() bool { return len(c.m) >= c.max }

// victim returns the least recently used table that matches, or nil.
func (c *cache) victim(ok func(*table) bool) *table {
	for t := c.lru.prev; t != &c.lru; t = t.prev {
		if t.pins == 0 && ok(t) {
			return t
		}
	}
	return nil
}

// alloc returns an unlinked table for off, its content undefined.
func (c *cache) alloc(off int64) *table {
	t := c.spare
	if t != nil {
		c.spare = nil
		d, g := t.data, t.gen
		*t = table{data: d, gen: g + 1}
	} else {
		t = &table{data: make([]byte, c.size)}
	}
	t.off = off
	return t
}

// insert makes an allocated table known; there must be none at its offset.
func (c *cache) insert(t *table) {
	if c.m[t.off] != nil {
		panic("qcow2: table is cached twice")
	}
	t.used = true
	c.m[t.off] = t
	c.toFront(t)
}

// drop forgets t, dirty or not.
func (c *cache) drop(t *table) {
	c.markClean(t)
	t.unlink()
	delete(c.m, t.off)
	if t.pins == 0 {
		c.spare = t
	}
}

// dropRange forgets all tables within [off, off+n).
func (c *cache) dropRange(off, n int64) {
	c.epoch++
	for o := off; o < off+n; o += int64(c.size) {
		if t := c.m[o]; t != nil {
			c.drop(t)
		}
	}
}

func (c *cache) markDirty(t *table) {
	t.gen++
	if !t.dirty {
		t.dirty = true
		c.ndirty++
	}
}

func (c *cache) markClean(t *table) {
	if t.dirty {
		t.dirty = false
		c.ndirty--
	}
}

// dirty lists the tables that are dirty, by their places.
func (c *cache) dirty() []*table {
	if c.ndirty == 0 {
		return nil
	}
	ts := make([]*table, 0, c.ndirty)
	for t := c.lru.next; t != &c.lru; t = t.next {
		if t.dirty {
			ts = append(ts, t)
		}
	}
	slices.SortFunc(ts, func(a, b *table) int { return cmp.Compare(a.off, b.off) })
	return ts
}

// clean frees clean tables that were not used since the last call.
func (c *cache) clean() {
	for t := c.lru.prev; t != &c.lru; {
		p := t.prev
		if !t.dirty && t.pins == 0 && !t.used {
			c.drop(t)
		}
		t.used = false
		t = p
	}
	c.spare = nil
}
