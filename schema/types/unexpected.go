package types

// unexpected names the member to complain about when several were not visited. The
// reference keeps them in a hash table and takes the first in the table's order.
func (f *frame) unexpected() string {
	first := ""
	for i, m := range f.dict.Members() {
		if !f.visited(i) {
			first = m.Name
			break
		}
	}
	return first
}
