package blockdev

import (
	"bytes"
	"slices"
	"strconv"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// nodeInfo is what query-named-block-nodes shows of one node, encoded, with gaps for what depends
// on others or changes without notice:
//
//	dev[0] {image} dev[1] backing_file_depth dev[2]
//	image: { ["backing-image": {image}, ] image[0] [, "actual-size": N] image[1]
//
// Immutable.
type nodeInfo struct {
	key   infoKey
	dev   [3][]byte
	image [2][]byte
}

func (i *nodeInfo) devSize() int { return len(i.dev[0]) + len(i.dev[1]) + len(i.dev[2]) }

// infoKey is all that a nodeInfo depends on. The sizes and so on are there too because requests
// change them on the way, and a query must not show what is long past.
type infoKey struct {
	gen           uint64
	size          int64
	readOnly      bool
	threshold     uint64
	name, backing *nodeName
	header        string
	bitmaps       []graph.BitmapState
}

// info is the encoding of n, whose record is r, made anew if n changed since it was made.
func (q *queries) info(n *graph.Node, r *record) *nodeInfo {
	key := infoKey{
		gen:       generation(n), // before the others
		size:      n.Size(),
		readOnly:  n.ReadOnly(),
		threshold: n.IO().WriteThreshold(),
		name:      q.nameOf(n, r),
		bitmaps:   n.Bitmaps().States(),
	}
	if e := n.Backing(); e != nil {
		key.backing = q.name(e.Node())
	}
	key.header, _ = backingFile(n)
	if old := r.info.Load(); old != nil && old.key.same(&key) {
		return old
	}
	fresh := q.encode(n, key)
	r.info.Store(fresh)
	return fresh
}

// generation changes when something that n shows of itself may have changed; what presents its file
// as its own may pass on what that shows.
func generation(n *graph.Node) uint64 {
	gen := n.InfoGeneration()
	for e := n.File(); e != nil && e.Role()&perm.Filtered != 0; e = e.Node().File() {
		gen = max(gen, e.Node().InfoGeneration())
	}
	if keeper, _ := snapshotter(n, false); keeper != nil {
		gen = max(gen, keeper.InfoGeneration())
	}
	return gen
}

// same compares names by what is shown of them.
func (k *infoKey) same(o *infoKey) bool {
	return k.gen == o.gen && k.size == o.size && k.readOnly == o.readOnly && k.threshold == o.threshold &&
		k.header == o.header && k.name.same(o.name) && k.backing.same(o.backing) && slices.Equal(k.bitmaps, o.bitmaps)
}

func (a *nodeName) same(b *nodeName) bool {
	return a == b || a != nil && b != nil && a.filename == b.filename
}

func (q *queries) encode(n *graph.Node, key infoKey) *nodeInfo {
	o := n.Options()
	name := n.Name()
	dev := types.BlockDeviceInfo{
		File:           key.name.filename,
		NodeName:       &name,
		Ro:             key.readOnly,
		Drv:            n.DriverName(),
		DetectZeroes:   o.DetectZeroes,
		Cache:          types.BlockdevCacheInfo{Writeback: true, Direct: o.Direct, NoFlush: o.NoFlush},
		WriteThreshold: int64(key.threshold),
	}
	if graph.WasInactive(n) {
		active := !n.Inactive()
		dev.Active = &active
	}
	if dev.DetectZeroes == "" {
		dev.DetectZeroes = types.BlockdevDetectZeroesOptionsOff
	}
	if key.backing != nil {
		dev.BackingFile = &key.backing.filename
	}
	for i := range key.bitmaps {
		dev.DirtyBitmaps = append(dev.DirtyBitmaps, bitmapInfo(&key.bitmaps[i]))
	}
	info := &nodeInfo{key: key}
	info.image[0], info.image[1], dev.Encrypted = q.encodeImage(n, key)
	// An empty image marks where the real one goes.
	gap := dev.Image.AppendJSON(nil)
	var s sizer
	for _, b := range dev.DirtyBitmaps {
		s.add(b.Name)
	}
	before, rest := cut(dev.AppendJSON(s.buffer()), `"image": `+string(gap), len(gap))
	middle, after := cut(rest, `"backing_file_depth": 0`, 1)
	info.dev = [3][]byte{before, middle, after}
	return info
}

func bitmapInfo(b *graph.BitmapState) *types.BlockDirtyInfo {
	info := &types.BlockDirtyInfo{
		Count: b.Count, Granularity: uint32(b.Granularity),
		Recording: b.Recording, Busy: b.Busy, Persistent: b.Persistent,
	}
	if b.Name != "" {
		info.Name = &b.Name
	}
	if b.Inconsistent {
		info.Inconsistent = &b.Inconsistent
	}
	return info
}

// cut splits enc behind the only place of mark, and drops the last n bytes of mark. Quotes within
// JSON strings are escaped, so that a mark with quotes is never part of one.
func cut(enc []byte, mark string, n int) (before, after []byte) {
	i := bytes.Index(enc, []byte(mark))
	if i < 0 {
		panic("blockdev: no " + mark + " in " + string(enc))
	}
	i += len(mark)
	return enc[: i-n : i-n], enc[i:]
}

func (q *queries) encodeImage(n *graph.Node, key infoKey) (before, after []byte, encrypted bool) {
	const gap = -1
	actual := int64(gap)
	img := types.ImageInfo{
		Filename:    key.name.filename,
		Format:      n.DriverName(),
		VirtualSize: blk.AlignUp(key.size, blk.SectorSize),
		ActualSize:  &actual,
	}
	if name, format := backingFile(n); name != "" {
		img.BackingFilename = &name
		if full, err := q.absolute(n, name); err == nil {
			img.FullBackingFilename = &full
		}
		if format != "" {
			img.BackingFilenameFormat = &format
		}
	}
	if d, ok := n.Driver().(graph.Informer); ok {
		d.ImageInfo(&img)
	}
	if keeper, s := snapshotter(n, false); s != nil && keeper != n {
		img.Snapshots = s.Snapshots()
	}
	const mark = `, "actual-size": -1`
	var s sizer
	for _, x := range img.Snapshots {
		s.add(&x.ID)
		s.add(&x.Name)
	}
	for i := range key.bitmaps { // the image has those of them that are persistent
		if key.bitmaps[i].Persistent {
			s.add(&key.bitmaps[i].Name)
		}
	}
	before, after = cut(img.AppendJSON(s.buffer()), mark, len(mark))
	return before[1:], after, img.Encrypted != nil && *img.Encrypted // without the brace
}

// sizer counts what lists take when they are encoded, whose length an image decides: a buffer that
// grows to some hundred MiB leaves several times as much behind.
type sizer struct {
	n       int
	scratch []byte
}

// add counts an element with that name.
func (s *sizer) add(name *string) {
	const rest = 200 // of the element, about
	s.n += rest
	if name != nil {
		s.scratch = value.AppendString(s.scratch[:0], *name)
		s.n += len(s.scratch)
	}
}

func (s *sizer) buffer() []byte {
	if s.n == 0 {
		return nil
	}
	return make([]byte, 0, s.n+4096)
}

// appendActual fills the gap for the allocated size.
func appendActual(b []byte, size int64) []byte {
	if size < 0 {
		return b
	}
	return strconv.AppendInt(append(b, `, "actual-size": `...), size, 10)
}
