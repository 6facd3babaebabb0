package driver

import (
	"bytes"
	"context"
	"fmt"
	"unicode/utf8"

	"qblockd/blockdev/crypto"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Opening is what Open gets beside the options. The children that the options name are attached,
// and nobody else can send requests.
type Opening struct {
	Ctx  context.Context // of the command
	Node *graph.Node
	// Req is for header reads and repairs; it belongs to an internal root and has passed its gate.
	Req *blk.Req
	// Warn reports something the user should know; it goes to the log.
	Warn func(msg string)
	// Objects are those of object-add; see Object.
	Objects Objects
	// Admit, if set, says that an image has named the node. A driver that opens files of the host
	// must ask it before it opens one.
	Admit func(f *FoundFile) error
	// Guessed, if set, says that the format was not given.
	Guessed *Guess
}

type atStart struct{}

// AtStart marks the context of what the command line names: it may name descriptors that the
// process has inherited.
func AtStart(ctx context.Context) context.Context { return context.WithValue(ctx, atStart{}, true) }

// IsAtStart tells whether AtStart marked the context.
func IsAtStart(ctx context.Context) bool { return ctx.Value(atStart{}) != nil }

// ChildNeeded is the error of an Open whose image names a child that is not there. The child is
// opened and attached, and Open called again.
type ChildNeeded struct {
	Name string // of the edge
	Role perm.Role
	File string // a plain file name
}

func (e *ChildNeeded) Error() string { return fmt.Sprintf("'%s' is required for this image", e.Name) }

// OpenFunc opens a driver on a node.
type OpenFunc func(x *Opening) (graph.Driver, error)

// FoundFile is a file of the host that a name has led to, and that is not open yet.
type FoundFile struct {
	Name string // as it was given
	Path string // without links; "" if that cannot be told
	// A regular file, a block device, a unix socket; none of them: something else.
	Regular, Device, Socket bool
	// Kernel: lies in a file system whose files the kernel makes up; to read one tells of the host
	// or does something.
	Kernel bool
}

// Guess is a format that was guessed from the first bytes of a file alone.
type Guess struct {
	File string // its name, "" if it has no plain one
	// Verbatim tells whether the first 512 bytes that are to be there would be taken for no other
	// format.
	Verbatim func(head []byte) bool
}

// Objects finds objects of object-add.
type Objects interface {
	// Object is what an object of that name is to drivers; nil: there is none.
	Object(id string) any
}

// Object finds an object that is a T. o may be nil.
func Object[T any](o Objects, id string) (x T, ok bool) {
	if o != nil {
		x, ok = o.Object(id).(T)
	}
	return x, ok
}

// Secret is an object that is one. What it returns is for the caller to close; ok is false if the
// object was deleted.
type Secret interface {
	Secret() (key *crypto.Key, ok bool, err error)
}

// Password is a copy of the text of the object secret called id, which the caller closes.
func Password(o Objects, id string) (*crypto.Key, error) {
	var found any
	if o != nil {
		found = o.Object(id)
	}
	s, is := found.(Secret)
	if found != nil && !is {
		return nil, fmt.Errorf("Object with id '%s' is not a secret", id)
	}
	var key *crypto.Key
	ok := false
	var err error
	if is {
		key, ok, err = s.Secret()
	}
	switch {
	case err != nil:
		return nil, err
	case !ok:
		return nil, fmt.Errorf("No secret with id '%s'", id)
	case !utf8.Valid(key.Bytes()), bytes.IndexByte(key.Bytes(), 0) >= 0:
		key.Close()
		return nil, fmt.Errorf("Data from secret %s is not valid UTF-8", id)
	}
	return key, nil
}

// Child is a child that options name.
type Child struct {
	Name string
	Role perm.Role
	Ref  *types.BlockdevRef
}

// Filtered is the one child of most filters.
func Filtered(file *types.BlockdevRef) []Child {
	return []Child{{"file", perm.Filtered | perm.Primary, file}}
}

// Names are the file names of a node: the one that queries show, and the plain one, which is empty
// if there is none.
type Names struct{ Shown, Plain string }

// AddGiven adds an option if it is given; for Strong.
func AddGiven[T any](add func(name string, v value.Value), name string, p *T) {
	if p != nil {
		add(name, *p)
	}
}

// ForImages is what an image's header may say of nodes of a driver. The driver only reads what its
// children and its file have, and does nothing else that a stranger should not be able to make the
// daemon do.
type ForImages struct {
	// Options count, besides children: they say what is read. Hints may be given, but say only how,
	// which is not for an image to decide.
	Options, Hints []string
	// Devices, Sockets: only if the image policy allows devices, or sockets. Object is the kind of
	// object that the options name; only if the policy allows references. Naming are options that
	// name objects; they count, and may be given only if it does.
	Devices, Sockets bool
	Object           string
	Naming           []string
}

// NoChange is the Reopen of drivers that can be reopened and have nothing that could change.
func NoChange[O any](graph.Driver, O, *graph.Options) (graph.Participant, error) { return nil, nil }
