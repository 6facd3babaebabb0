// Package perm derives and checks the permissions of block graph edges. It is pure:
// values in, values out.
//
// Every edge carries a Claim: what the parent above needs of the node below, and what it
// lets the node's other parents do. What a node needs of its children follows from what
// its own parents need (EdgeClaim, Default), so a change at the top runs down the graph as
// far as something changes. A Draft holds changes on top of a View that is never modified;
// its Plan settles the claims and checks three rules at each node touched:
//
//   - no edge needs what another edge above the same node does not share;
//   - nobody writes to a read-only node;
//   - there are no cycles (checked when an edge is made).
package perm

import "strings"

// Perm is a set of permissions on a node.
type Perm uint8

const (
	// ConsistentRead: what is read is complete and belongs to one point in time.
	ConsistentRead Perm = 1 << iota
	// Write: the visible data may be changed.
	Write
	// WriteUnchanged: data may be written that does not change what is visible.
	WriteUnchanged
	// Resize: the size may be changed.
	Resize

	None Perm = 0
	All       = ConsistentRead | Write | WriteUnchanged | Resize
	// Changes are those to change an image.
	Changes = All &^ ConsistentRead
)

// permCount is the number of different permissions.
const permCount = 4

var permNames = [permCount]string{"consistent read", "write", "write unchanged", "resize"}

// String lists the permissions as conflicts do: "write, resize".
func (p Perm) String() string {
	var s []string
	for i, name := range permNames {
		if p&(1<<i) != 0 {
			s = append(s, name)
		}
	}
	return strings.Join(s, ", ")
}

// Claim is what one edge asks of the node below it. Need: what the parent uses. Share:
// what it lets the node's other parents use.
type Claim struct{ Need, Share Perm }

// Loosens tells whether c asks for nothing that old did not ask for.
func (c Claim) Loosens(old Claim) bool {
	return c.Need&^old.Need == 0 && old.Share&^c.Share == 0
}

// Unused is the claim on a node without parents.
var Unused = Claim{None, All}

// Role tells what a parent uses a child for; a set.
type Role uint8

const (
	// Data: the child stores data of the parent.
	Data Role = 1 << iota
	// Metadata: the child stores the parent's own structures.
	Metadata
	// Filtered: the child presents the same data as the parent; excludes the three others.
	Filtered
	// COW: the child is read where the parent has nothing of its own (backing).
	COW
	// Primary: the child that names the parent best ("file").
	Primary

	// Image is what a format uses its file for.
	Image = Data | Metadata | Primary
)

// Default is the claim of a node on a child in that role, when the node's own parents
// claim up. writable: the node is neither read-only nor inactive. A node without parents
// passes Unused, and a pure data or filter role then takes nothing.
func Default(role Role, up Claim, writable, inactive bool) Claim {
	switch {
	case role&Filtered != 0:
		return Claim{up.Need & All, up.Share & All}
	case role&COW != 0:
		return forCOW(up, inactive)
	case role&(Data|Metadata) != 0:
		return forStorage(role, up, writable, inactive)
	}
	return Unused
}

// forCOW: a backing file is only read; whoever can live with changing data can live with a
// changing backing file.
func forCOW(up Claim, inactive bool) Claim {
	c := Claim{up.Need & ConsistentRead, ConsistentRead | WriteUnchanged}
	if up.Share&Write != 0 || inactive {
		c.Share |= Write | Resize
	}
	return c
}

func forStorage(role Role, up Claim, writable, inactive bool) Claim {
	c := Claim{up.Need & All, up.Share & All}
	if role&Metadata != 0 {
		// A format writes its metadata at times of its own choosing and relies on nobody else doing
		// so.
		if writable {
			c.Need |= Write | Resize
		}
		c.Need |= ConsistentRead
		c.Share &^= Write | Resize
	}
	if role&Data != 0 {
		c.Share &^= Resize
		// Unchanged data may still land in newly allocated places, and those may lie beyond the
		// end.
		if c.Need&WriteUnchanged != 0 {
			c.Need |= Write
		}
		if c.Need&Write != 0 {
			c.Need |= Resize
		}
	}
	if inactive {
		c.Share |= Write | Resize
	}
	return c
}

// Counts sums the claims of all edges above a node, so that adding one costs the same
// however many there are. The zero value is a node without parents.
type Counts struct {
	need, unshare, both [permCount]int32 // both: one edge needs it and does not share it
}

// Add counts an edge (by 1) or forgets one (by -1).
func (k *Counts) Add(c Claim, by int32) {
	for i := range permCount {
		bit := Perm(1) << i
		n, u := c.Need&bit != 0, c.Share&bit == 0
		if n {
			k.need[i] += by
		}
		if u {
			k.unshare[i] += by
		}
		if n && u {
			k.both[i] += by
		}
	}
}

// Claim is the cumulative claim: Need joined, Share intersected.
func (k *Counts) Claim() Claim {
	c := Unused
	for i := range permCount {
		if k.need[i] > 0 {
			c.Need |= 1 << i
		}
		if k.unshare[i] > 0 {
			c.Share &^= 1 << i
		}
	}
	return c
}

// Conflict tells whether some edge needs what another does not share.
func (k *Counts) Conflict() bool {
	for i := range permCount {
		n, u := k.need[i], k.unshare[i]
		if n > 0 && u > 0 && !(n == 1 && u == 1 && k.both[i] == 1) {
			return true
		}
	}
	return false
}
