// Package perm derives and checks the permissions of block graph edges. It is pure:
// values in, values out.
package perm

// Perm is a set of permissions on a node.
type Perm uint8

const (
	ConsistentRead Perm = 1 << iota
	Write
	WriteUnchanged
	Resize

	None Perm = 0
	All       = ConsistentRead | Write | WriteUnchanged | Resize
)

// Claim is what one edge asks of the node below it. Need: what the parent uses. Share:
// what it lets the node's other parents use.
type Claim struct{ Need, Share Perm }

// Role tells what a parent uses a child for; a set.
type Role uint8

const (
	Data Role = 1 << iota
	Metadata
	Filtered
	COW
	Primary
)

// Counts tells, for each permission, how many edges above a node need it and how many do not share it.
type Counts struct{ Need, Unshare [4]int32 }
