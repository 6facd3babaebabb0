package driver

import (
	"context"

	"qblockd/graph"
	"qblockd/schema/types"
)

// CreateFunc makes an image from the driver's branch of BlockdevCreateOptions. It blocks until the
// image is there.
type CreateFunc func(ctx context.Context, c *Creation, o any) error

// Creates makes a CreateFunc of a function of the branch's type.
func Creates[C any](f func(ctx context.Context, c *Creation, o C) error) CreateFunc {
	return func(ctx context.Context, c *Creation, o any) error { return f(ctx, c, o.(C)) }
}

// AmendFunc begins to change the format's options in the image of a node, to the driver's branch of
// BlockdevAmendOptions. It does what has to be done before the job starts; its errors are those of
// the command.
type AmendFunc func(ctx context.Context, a *Amendment, o any) (*Amending, error)

// Amends makes an AmendFunc of a function of the branch's type that is all there is to do. It gets
// nil for a branch that has no members.
func Amends[A any](f func(ctx context.Context, n *graph.Node, o A) error) AmendFunc {
	return func(_ context.Context, a *Amendment, o any) (*Amending, error) {
		u, _ := o.(A)
		return &Amending{
			Do:  func(ctx context.Context, _ func()) error { return f(ctx, a.Node, u) },
			End: func() {},
		}, nil
	}
}

// Amendment is what Amend gets beside the options.
type Amendment struct {
	Graph *graph.Graph
	Node  *graph.Node
	// Force: also do what may lose data.
	Force bool
	// Objects are those of object-add.
	Objects Objects
}

// Amending is a change that has begun: Do makes it, holding the node (graph.Hold), and calls
// started before its first I/O; End, which is called in any case, gives back what it has taken.
type Amending struct {
	Do  func(ctx context.Context, started func()) error
	End func()
}

// Creation is what Create gets beside the options.
type Creation struct {
	// Objects are those of object-add.
	Objects Objects
	// Started is called once the options are checked, before the first write.
	Started func()
	// Take makes a file of the host the command's, before its content is touched. Error: it is
	// another command's, or the command has ended.
	Take func(m Made) error
	// InFile opens the node that a reference names, for writing and resizing, which nobody else may
	// do meanwhile.
	InFile func(ctx context.Context, file *types.BlockdevRef, use func(root *graph.Root) error) error
	// Filename is how a header names a node.
	Filename func(n *graph.Node) string
	// CanName refuses drivers that headers of images cannot name as the format of a backing file.
	CanName func(d types.BlockdevDriver) error
}

// Made is a file of the host that a command is making.
type Made struct {
	ID graph.FileID
	// Remove takes it away again if it is new, still has its name and is used by nobody; nil: it
	// was there before.
	Remove func()
}

// Image describes an image that a command makes by the way.
type Image struct {
	Size int64 // bytes
	// Backing is the file name that the new image names as its backing file, of the format
	// BackingFormat; "" for none.
	Backing, BackingFormat string
}
