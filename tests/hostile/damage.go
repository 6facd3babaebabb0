package hostile

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"qblockd/blockdev/format/qcow2/layout"
)

// Damage is one change of a base image: patches, or another length of the file.
type Damage struct {
	Field   string // what is damaged
	Value   string // how, in words
	Patches []Piece
	Build   func() []Piece // makes Patches, where they are large
	Length  int64          // without either
}

func (d *Damage) patches() []Piece {
	if d.Build != nil {
		return d.Build()
	}
	return d.Patches
}

func (d *Damage) String() string { return d.Field + " = " + d.Value }

// value is something that a field can be set to.
type value struct {
	name string
	v    uint64
}

// Damages are all single damages of a base image, in an order that does not change. names are what
// backing names may lead to; see Names.
func (b *Base) Damages(names []string) []*Damage {
	var out []*Damage
	for _, f := range b.Fields {
		if name := strings.TrimPrefix(f.Name, "refcount."); !second(name) || slices.Contains(secondToo, f.Name) {
			out = append(out, b.damagesOf(&f, names)...)
		}
	}
	seen := map[int64]bool{b.Length: true}
	cut := func(what string, at int64) {
		if at >= 0 && !seen[at] {
			seen[at] = true
			out = append(out, &Damage{Field: "length", Value: what, Length: at})
		}
	}
	for _, p := range b.Places {
		if second(p.Name) {
			continue
		}
		cut("up to "+p.Name, p.Off)
		cut("up to 8 bytes into "+p.Name, p.Off+8)
		cut("up to the middle of "+p.Name, p.Off+p.N/2)
	}
	cut("71 bytes", 71)
	cut("511 bytes", 511)
	cut("a sector less", b.Length-512)
	cut("a byte less", b.Length-1)
	if b.Size > 0 {
		out = append(out, b.bulk()...)
	}
	return out
}

// secondToo are fields that are damaged in the second snapshot and bitmap, too.
var secondToo = []string{"s1.l1_table_offset", "s1.l1_size", "s1.l2.shared", "b1.bitmap_table_offset", "b1.flags", "b2.table[0]"}

func (b *Base) damagesOf(f *Field, names []string) (out []*Damage) {
	set := func(name string, p []byte) {
		if !bytes.Equal(p, b.get(f.Off, len(p))) {
			out = append(out, &Damage{Field: f.Name, Value: name, Patches: []Piece{{f.Off, p}}})
		}
	}
	integer := func(values []value) {
		for _, v := range values {
			p := be.AppendUint64(nil, v.v)
			set(v.name, p[8-f.Width:])
		}
	}
	number := func() uint64 { return be.Uint64(append(make([]byte, 8-f.Width), b.get(f.Off, f.Width)...)) }
	switch f.Class {
	case Pointer:
		integer(b.pointers(f, number()))
	case Dull:
		integer([]value{{"0", 0}, {"one more", number() + 1}, {"all ones", ^uint64(0)}})
	case Count:
		integer(counts(f.Width, number()))
	case Bits:
		old := b.get(f.Off, f.Width)
		set("all zero", make([]byte, f.Width))
		set("all ones", bytes.Repeat([]byte{0xff}, f.Width))
		for i := range f.Width * 8 {
			if i < 10 || i%8 == 7 || i >= f.Width*8-3 {
				p := bytes.Clone(old)
				p[f.Width-1-i/8] ^= 1 << (i % 8)
				set(fmt.Sprintf("with bit %d flipped", i), p)
			}
		}
	case Refcount:
		return b.refcountDamages(f)
	case Packed:
		integer(b.packed(number()))
	case Stream:
		for _, v := range streams(b.get(f.Off, f.Width)) {
			set(v.name, v.b)
		}
	case Name:
		return b.nameDamages(f, names)
	case Format:
		for _, v := range formats {
			p := append([]byte(v), make([]byte, max(0, 8-len(v)))...)
			d := &Damage{Field: f.Name, Value: fmt.Sprintf("%q", v), Patches: []Piece{{f.Off, p}, u32(f.Off-4, uint32(len(v)))}}
			if len(p) <= (f.Width+7)&^7 {
				out = append(out, d)
			}
		}
	}
	return out
}

// pointers are where a table entry or a header field with the value old may lead. Flags outside an
// aligned offset stay, unless they are what is changed.
func (b *Base) pointers(f *Field, old uint64) []value {
	flags := old &^ layout.OffsetMask
	cs := uint64(b.cs())
	end := (uint64(b.Length) + cs - 1) &^ (cs - 1)
	l := []value{{"0", 0}, {"0 with flags", flags}}
	for _, p := range b.Places {
		if second(p.Name) && f.Off != p.Off {
			continue
		}
		l = append(l, value{p.Name, flags | uint64(p.Off)})
		if f.Off >= p.Off && f.Off < p.Off+p.N {
			l = append(l, value{"itself", flags | uint64(p.Off)})
		}
	}
	off := old & layout.OffsetMask
	l = append(l, []value{{"the end of the file", flags | end}, {"just beyond the end", flags | (end + cs)},
		{"the last cluster", flags | (end - cs)}, {"2^40", flags | 1<<40}, {"2^55", flags | 1<<55},
		{"the last below 2^56", flags | (1<<56 - cs)}, {"2^56", flags | 1<<56}, {"2^62", 1 << 62}, {"2^63", 1 << 63},
		{"2^63 less a cluster", 1<<63 - cs}, {"all ones", ^uint64(0)}, {"one more", old + 1}, {"512 more", old + 512},
		{"half a cluster more", old + cs/2}, {"the next cluster", flags | (off + cs)},
		{"copied and the end", layout.Copied | end}, {"copied and data", layout.Copied | uint64(b.place("data"))}}...)
	for _, bit := range []int{0, 1, 8, 56, 61, 62, 63} {
		l = append(l, value{fmt.Sprintf("with bit %d flipped", bit), old ^ 1<<bit})
	}
	return l
}

// second tells whether a structure is like another that comes before it.
func second(name string) bool {
	return strings.HasPrefix(name, "s1.") || strings.HasPrefix(name, "b1.") || strings.HasPrefix(name, "b2.")
}

// place is where a structure is, 0 if the base has none of that name.
func (b *Base) place(name string) int64 {
	if i := slices.IndexFunc(b.Places, func(p Place) bool { return p.Name == name }); i >= 0 {
		return b.Places[i].Off
	}
	return 0
}

// counts are what a number of width bytes may be.
func counts(width int, old uint64) []value {
	top := uint(width*8 - 1)
	l := []value{{"0", 0}, {"1", 1}, {"one more", old + 1}, {"one less", old - 1}, {"8 more", old + 8},
		{"twice", old * 2}, {"half", old / 2}, {"the sign bit", 1 << top}, {"below the sign bit", 1<<top - 1},
		{"all ones", ^uint64(0)}, {"all but one", ^uint64(1)}}
	for _, bit := range []uint{4, 9, 16, 20, 28, 31, 40, 52, 56, 61} {
		if bit < top {
			l = append(l, value{fmt.Sprintf("2^%d", bit), 1 << bit})
		}
	}
	return l
}

func (b *Base) refcountDamages(f *Field) (out []*Damage) {
	g := b.geometry()
	// The entries' bytes: up to 8, or the one that holds some.
	at, n, i := f.Off+f.Index<<b.Order/8, max(1, 1<<b.Order/8), int64(0)
	if b.Order < 3 {
		i = f.Index & (8>>b.Order - 1)
	}
	old := b.get(at, n)
	was := g.Refcount(old, i)
	seen := map[uint64]bool{was: true}
	most := g.RefcountMax()
	for _, v := range []value{{"0", 0}, {"1", 1}, {"2", 2}, {"one more", was + 1}, {"one less", was - 1},
		{"the most", most}, {"half of the most", most / 2}} {
		if v.v > most || seen[v.v] {
			continue
		}
		seen[v.v] = true
		p := bytes.Clone(old)
		g.SetRefcount(p, i, v.v)
		out = append(out, &Damage{Field: f.Name, Value: v.name, Patches: []Piece{{at, p}}})
	}
	return out
}

// packed are L2 entries for compressed data in place of old.
func (b *Base) packed(old uint64) []value {
	g := b.geometry()
	off, n := g.CompressedRange(old)
	shift := 62 - (b.ClusterBits - 8)
	most := (uint64(1)<<(b.ClusterBits-8) - 1) << shift
	cs := b.cs()
	end := (b.Length + cs - 1) &^ (cs - 1)
	var l []value
	for _, p := range b.Places {
		if second(p.Name) {
			continue
		}
		l = append(l, value{p.Name, g.CompressedEntry(p.Off, min(n, cs))}, value{"plain at " + p.Name, uint64(p.Off) | layout.Copied})
	}
	return append(l, []value{{"0", 0}, {"compressed at 0", layout.Compressed}, {"most sectors", old | most},
		{"one sector", old &^ most}, {"the end", g.CompressedEntry(end, n)},
		{"up to the end", g.CompressedEntry(end-512, n)}, {"beyond the end", g.CompressedEntry(end+cs, n)},
		{"one byte on", g.CompressedEntry(off+1, n)}, {"one sector on", g.CompressedEntry(off+512, n)},
		{"a cluster on", g.CompressedEntry(off+cs, n)}, {"far", layout.Compressed | 1<<(shift-1)},
		{"all ones", ^uint64(0)}, {"all ones but copied", 1<<63 - 1}, {"copied", old | layout.Copied},
		{"zero", old | 1}}...)
}

type stream struct {
	name string
	b    []byte
}

// streams are what compressed data may be instead of s, in as many bytes.
func streams(s []byte) []stream {
	edit := func(f func(p []byte)) []byte { p := bytes.Clone(s); f(p); return p }
	l := []stream{{"zeroes", make([]byte, len(s))}, {"ones", bytes.Repeat([]byte{0xff}, len(s))},
		{"another first byte", edit(func(p []byte) { p[0] ^= 0x15 })}, {"another byte in the middle", edit(func(p []byte) { p[len(p)/2] ^= 0x40 })},
		{"no end", edit(func(p []byte) { clear(p[len(p)-len(p)/3:]) })}}
	for i := 4; i < min(10, len(s)); i++ {
		l = append(l, stream{fmt.Sprintf("byte %d all ones", i), edit(func(p []byte) { p[i] = 0xff })})
	}
	bomb := deflated(make([]byte, 1<<20))
	return append(l, stream{"a mebibyte", edit(func(p []byte) { copy(p, bomb) })})
}

// formats are what a header may say its backing file is.
var formats = []string{"raw", "qcow2", "file", "host_device", "null-co", "null-aio", "compress", "throttle", "copy-on-read", "copy-before-write", "blkdebug",
	"blkverify", "blklogwrites", "preallocate", "snapshot-access", "nbd", "nothing", "", "%s%s%n", "\xff\xfe", "raw\x00x"}

func (b *Base) nameDamages(f *Field, names []string) (out []*Damage) {
	room := int(b.cs() - f.Off)
	for _, v := range names {
		if len(v) > room {
			continue
		}
		shown := v
		if len(shown) > 100 {
			shown = shown[:100] + "..."
		}
		// The length stands in the header.
		patches := []Piece{{f.Off, []byte(v)}, u32(16, uint32(len(v)))}
		out = append(out, &Damage{Field: f.Name, Value: fmt.Sprintf("%q", shown), Patches: patches})
	}
	return out
}

// Names are backing names that an image should not get far with; the files named lie in dir, which
// the image's own folder lies beside, and self is the image's name.
func Names(self string) []string {
	file := func(name string) string { return `{"driver":"file","filename":"../canary/` + name + `"}` }
	return []string{"", "\x00", "\xff\xfe\xfd", self, "./" + self, ".", "..", "../canary", "back.raw/", "/dev/zero", "/dev/fd/3", "/dev/stdin", "/proc/self/mem", "/proc/self/environ",
		"../canary/fifo", "../canary/socket", "../canary/secret", "file:../canary/secret", "nbd:unix:../nbd.sock:exportname=healthy", "nbd+unix:///healthy?socket=../nbd.sock",
		"fat:rw:../canary", "http://127.0.0.1:1/", "ssh://127.0.0.1/x", "host_device:/dev/null", "blkdebug::../canary", "blkverify:../canary:../canary", "json:", "json:{", "json:{}", "json:[]", "json:null", `json:{"driver":"healthy"}`,
		`json:{"file":"healthy"}`, `json:{"driver":"qcow2","file":"healthy"}`, `json:{"driver":"raw","file":"healthyfile"}`, `json:{"driver":"null-co"}`,
		`json:{"driver":"null-co","size":9223372036854775807}`, `json:{"driver":"null-co","size":9223372036854775807,"latency-ns":9223372036854775807}`,
		`json:{"driver":"qcow2","file":` + file("disk.qcow2") + `,"read-only":false}`, `json:{"driver":"qcow2","file":` + file("dirty.qcow2") + `,"read-only":false}`,
		`json:{"driver":"blklogwrites","file":` + file("raw") + `,"log":` + file("log") + `}`, `json:{"driver":"preallocate","file":` + file("raw") + `}`,
		`json:{"driver":"blkverify","test":` + file("raw") + `,"raw":` + file("secret") + `}`, `json:{"driver":"copy-before-write","file":` + file("raw") + `,"target":` + file("secret") + `}`,
		`json:{"driver":"copy-on-read","file":` + file("dirty.qcow2") + `,"read-only":false}`, `json:{"driver":"throttle","throttle-group":"none","file":` + file("raw") + `}`,
		`json:{"driver":"snapshot-access","file":"healthy"}`, `json:{"driver":"blkdebug","image":` + file("raw") + `,"config":"../canary/secret"}`,
		`json:{"driver":"blkdebug","image":` + file("raw") + `,"inject-error":[{"event":"read_aio","errno":5}]}`, `json:{"driver":"compress","file":` + file("raw") + `}`,
		`json:{"driver":"raw","offset":4096,"size":9223372036854771200,"file":` + file("raw") + `}`, `json:{"driver":"file","filename":"../canary/secret","locking":"on","read-only":false}`,
		`json:{"driver":"file","filename":"../canary/secret","pr-manager":"x"}`, `json:{"driver":"file","filename":"../canary/disk.qcow2","aio":"native","cache":{"direct":true}}`,
		"json:" + strings.Repeat("[", 900), "json:" + strings.Repeat(`{"a":`, 180), "json:{" + `"file` + strings.Repeat(".file", 150) + `.driver":"raw"}`, strings.Repeat("x", 1023),
		strings.Repeat("../", 300) + "etc/passwd", "json:{" + `"` + strings.Repeat("a.", 400) + `b":1}`}
}

// CasesOf makes the numbered cases of a seed: every single damage once, then pairs.
type CasesOf struct {
	Bases   []*Base
	singles []single
	seed    uint64
	damages [][]*Damage
}

type single struct {
	base *Base
	d    *Damage
}

// Case is a base with damage, and the number that everything else about it is drawn from.
type Case struct {
	Number  int
	Base    *Base
	Damages []*Damage
}

func (c *Case) String() string {
	var w []string
	for _, d := range c.Damages {
		w = append(w, d.String())
	}
	return fmt.Sprintf("case %d: %s with %s", c.Number, c.Base.Name, strings.Join(w, " and "))
}

// Rand is the case's source of chance.
func (c *Case) Rand(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, uint64(c.Number))) }

// shareOf is which part of the damage is done to a base that is not there for every kind of it.
const shareOf = 8

// NewCases lists the cases of a seed.
func NewCases(seed uint64, names []string) *CasesOf {
	c := &CasesOf{seed: seed}
	r := rand.New(rand.NewPCG(seed, 0))
	for _, s := range Specs {
		b := NewBase(s)
		all := b.Damages(names)
		c.Bases = append(c.Bases, b)
		c.damages = append(c.damages, all)
		for _, d := range all {
			if s.Every || b.own(d) || d.Build != nil && r.IntN(3) == 0 || r.IntN(shareOf) == 0 {
				c.singles = append(c.singles, single{b, d})
			}
		}
	}
	r.Shuffle(len(c.singles), func(i, j int) { c.singles[i], c.singles[j] = c.singles[j], c.singles[i] })
	return c
}

// own tells whether d damages what the base is there for.
func (b *Base) own(d *Damage) bool {
	about := func(prefixes ...string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(d.Field, p) })
	}
	switch {
	case b.Backing != "":
		return about("backing")
	case b.Zstd:
		return about("stream", "l2.packed")
	case b.Order != 4:
		return about("ref")
	case b.Dirty:
		return about("ref", "l2", "length")
	case b.Extras:
		return about("ext")
	case b.Tail > 0:
		return about("length")
	}
	return b.Size == 0
}

// Singles is how many cases have one damage only; they come first.
func (c *CasesOf) Singles() int { return len(c.singles) }

// Case is number n, from 0.
func (c *CasesOf) Case(n int) *Case {
	if n < len(c.singles) {
		s := c.singles[n]
		return &Case{n, s.base, []*Damage{s.d}}
	}
	r := rand.New(rand.NewPCG(c.seed, 1<<32+uint64(n)))
	i := r.IntN(len(c.Bases))
	k := &Case{n, c.Bases[i], nil}
	for range 2 + r.IntN(8)/7 {
		k.Damages = append(k.Damages, c.damages[i][r.IntN(len(c.damages[i]))])
	}
	return k
}
