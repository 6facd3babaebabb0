package graph

import (
	"fmt"

	"qblockd/schema/types"
)

// FileID tells files of the host apart, whatever their names: a regular file by its file system and
// inode; a device, whose inode counts as 0, by its number.
type FileID struct{ Dev, Ino uint64 }

// Options are the generic properties of a node.
type Options struct {
	Name       string // "" generates one
	DriverName string
	Kind       Kind
	Reopens    bool // the driver takes other options while it is open (blockdev-reopen)
	ReadOnly   bool
	// AutoReadOnly: the driver may fall back to read-only where the medium allows no writing.
	AutoReadOnly bool
	ForceShare   bool
	Direct       bool // cache.direct
	NoFlush      bool // cache.no-flush
	Implicit     bool // inserted by a job, left out of chains that users see
	NeverFreeze  bool // a job's filter, which must be free to go: no link to it can be frozen by FreezeChain
	Discard      bool // discard=unmap
	Inactive     bool // it was opened so
	// InactiveFile: so is a file that it defines.
	InactiveFile bool
	DetectZeroes types.BlockdevDetectZeroesOptions
	// Canonical holds the options as given, for reopen, json: names and recorded state.
	Canonical *types.BlockdevOptions
	// Inherited are the generic options that the node has from Canonical or from the parent that
	// defined it.
	Inherited Inheritable
}

// CanReopen tells why the node cannot be reopened, nil if it can.
func (o *Options) CanReopen() error {
	if o.Reopens {
		return nil
	}
	return fmt.Errorf("Block format '%s' used by node '%s' does not support reopening files", o.DriverName, o.Name)
}

// Inheritable are the generic options that a node hands down to the children that it defines; nil:
// neither it nor its parent says.
type Inheritable struct{ Direct, NoFlush, ForceShare, ReadOnly, AutoReadOnly *bool }
