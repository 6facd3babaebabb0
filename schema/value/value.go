// Package value holds JSON values as QAPI sees them: integers stay integers,
// objects keep the order in which their members arrived, and are printed in the
// order of QEMU's hash table.
//
// A Value is one of: Null, bool, int64, uint64 (only above math.MaxInt64),
// float64, string, List, *Dict. Nothing else ever appears in one.
package value

// Value is a JSON value; see the package comment for its dynamic types.
type Value = any

// Null is the JSON null.
type Null struct{}

// List is a JSON array.
type List []Value

// Member is one name/value pair of a Dict.
type Member struct {
	Name  string
	Value Value
}

// Dict is a JSON object. Members are kept in order of insertion, names are unique.
// The zero value is an empty object.
type Dict struct {
	members []Member
	index   map[string]int // name -> place in members; nil while len(members) <= indexAbove
}

// indexAbove is the number of members from which a Dict looks names up in a map: a client
// may send objects with a million members.
const indexAbove = 24

// Len is the number of members.
func (d *Dict) Len() int {
	if d == nil {
		return 0
	}
	return len(d.members)
}

// Members returns the members in order of insertion. The caller must not change the slice.
func (d *Dict) Members() []Member {
	if d == nil {
		return nil
	}
	return d.members
}

// find returns the place of the member called name, or -1.
func (d *Dict) find(name string) int {
	if d.index != nil {
		if i, ok := d.index[name]; ok {
			return i
		}
		return -1
	}
	for i := range d.members {
		if d.members[i].Name == name {
			return i
		}
	}
	return -1
}

// Get returns the member called name.
func (d *Dict) Get(name string) (Value, bool) {
	if d != nil {
		if i := d.find(name); i >= 0 {
			return d.members[i].Value, true
		}
	}
	return nil, false
}

// Set replaces the member called name in place, or appends it.
func (d *Dict) Set(name string, v Value) {
	if i := d.find(name); i >= 0 {
		d.members[i].Value = v
		return
	}
	d.add(name, v)
}

// add appends a member whose name is known to be new.
func (d *Dict) add(name string, v Value) {
	d.members = append(d.members, Member{name, v})
	if d.index != nil {
		d.index[name] = len(d.members) - 1
	} else if len(d.members) > indexAbove {
		d.reindex()
	}
}

func (d *Dict) reindex() {
	d.index = make(map[string]int, 2*len(d.members))
	for i := range d.members {
		d.index[d.members[i].Name] = i
	}
}

// Del removes the member called name and tells whether it was there. It costs time in
// proportion to the number of members.
func (d *Dict) Del(name string) bool {
	if d == nil {
		return false
	}
	i := d.find(name)
	if i < 0 {
		return false
	}
	d.members = append(d.members[:i], d.members[i+1:]...)
	d.index = nil
	if len(d.members) > indexAbove {
		d.reindex()
	}
	return true
}

// Bucket is the slot of QEMU's hash table that a member name falls into.
// Objects are printed by ascending bucket; within a bucket the later inserted comes first.
func Bucket(name string) uint32 {
	v := uint32(0x238F13AF) * uint32(len(name))
	for i := 0; i < len(name); i++ {
		v += uint32(name[i]) << (uint(i) * 5 % 24)
	}
	return (1103515243*v + 12345) % 512
}
