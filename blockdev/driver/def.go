package driver

import (
	"io/fs"
	"strings"

	"qblockd/graph"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Def describes a driver whose branch of BlockdevOptions is an O, a pointer. Only Name, Kind and
// Open are required; a function that is nil says that the driver has no such thing.
type Def[O any] struct {
	Name types.BlockdevDriver
	Kind graph.Kind

	// Open opens the driver on a hidden node. It blocks as long as the storage does and leaves
	// nothing behind when it fails.
	Open func(x *Opening, u O) (graph.Driver, error)
	// Check refuses options that are wrong whatever they lead to. Nothing is opened before all are
	// checked.
	Check func(u O) error
	// Children are the children that the options name, but the backing file. The references point
	// into u.
	Children func(u O) []Child
	// List is the option that lists children: those named "LIST.NUMBER" are its elements.
	List string
	// Backing is the option of that name, nil if it is not given.
	Backing func(u O) *types.BlockdevRefOrNull

	// Reopen checks the options that the node of an open driver is to have, as Open would, and
	// generic ones. What it returns, nil if there is nothing to do, changes to them: it is prepared
	// before the permissions, while the node is drained, and may block then; its Commit runs before
	// that of a graph.PermTaker. A driver without it cannot be reopened, nor made read-only or
	// writable.
	Reopen func(d graph.Driver, u O, generic *graph.Options) (graph.Participant, error)
	// Changeable are the options that a reopen may change, or leave out to have their defaults;
	// ChangeOnly those that it may change and not leave out. An option with members stands for all
	// of them.
	Changeable, ChangeOnly []string

	// Prefix selects the driver in file names "PREFIX:...".
	Prefix string
	// MorePrefixes do the same.
	MorePrefixes []string
	// TakesPath tells whether file names without a prefix are for the driver that lead to a file of
	// that mode, 0 if there is none.
	TakesPath func(mode fs.FileMode) bool
	// FromName makes options of a file name, which may have the prefix. Protocols have it.
	FromName func(name string) (O, error)
	// FromNames is FromName of a driver whose names have those of children in them. named makes the
	// child of one: a protocol, or an image whose format is guessed.
	FromNames func(name string, named func(name string, image bool) (types.BlockdevRef, error)) (O, error)
	// Filename is the plain file name that opens an equal node, "" if there is none. child gives
	// the names of a child, empty ones if there is no such child. u is nil for nodes that jobs
	// make. By default a node above a protocol has the name of its file, if no option of it is
	// strong.
	Filename func(u O, child func(name string) Names) string
	// NoFolder: file names do not lie in a folder, so that nothing is relative to them; it is what
	// the error calls the nodes.
	NoFolder string
	// LikeProtocol is a filter that counts as a protocol, as it does in QEMU: plain file names can
	// open it, also below a format, and its allocated size is not known.
	LikeProtocol bool
	// Strong calls add for the given options, beside driver and children, that matter for what is
	// read and written: they go into "json:" file names.
	Strong func(u O, add func(name string, v value.Value))

	// Complete adds to options of a "json:" file name what QEMU, which writes such names into
	// images, leaves out. What it returns, nil if there is nothing to do, is called with the
	// options that are made of them.
	Complete func(o *value.Dict) (then func(u any))
	// FromFile makes the options of a format that is told nothing but its file.
	FromFile func(file types.BlockdevRef) O
	// Probe rates how well the first bytes of a file, up to 512, fit: 0 to 100.
	Probe func(head []byte) int
	// Verbatim: an image is its file, byte for byte. What no Probe wants is taken for one, and a
	// new one is made by making its file.
	Verbatim bool

	// ForImages is what the headers of images may say of nodes of the driver; nil: they may not
	// name any.
	ForImages *ForImages

	// Create executes blockdev-create; see Creates.
	Create CreateFunc
	// NewImage makes what Create is given where a command makes an image by the way
	// (blockdev-snapshot-sync): in the file that u names if it is a protocol's, else in the node
	// below u.
	NewImage func(u O, i *Image) any
	// Preexisting: file names lead to what is there already and keeps its size, for instance
	// devices. Making an image on it overwrites its beginning.
	Preexisting bool
	// MaxBackingName and MaxBackingFormat are the longest words, in bytes, that the header of an
	// image has room for.
	MaxBackingName, MaxBackingFormat int
	// Amend executes x-blockdev-amend; see Amends.
	Amend AmendFunc
	// Measure executes x-qblockd-measure; see Measures.
	Measure MeasureFunc
}

// Listed tells whether a child of that name is an element of the option List.
func (d *Def[O]) Listed(child string) bool {
	return d.List != "" && strings.HasPrefix(child, d.List+".")
}

// Any is a Def whose functions take options of the one type that they were made for.
type Any = Def[any]

// Of makes a Def one of the common type.
func Of[O any](d Def[O]) *Any {
	a := &Any{
		Name: d.Name, Kind: d.Kind, Changeable: d.Changeable, ChangeOnly: d.ChangeOnly, Prefix: d.Prefix,
		MorePrefixes: d.MorePrefixes, List: d.List, NoFolder: d.NoFolder, LikeProtocol: d.LikeProtocol,
		TakesPath: d.TakesPath, Probe: d.Probe, Verbatim: d.Verbatim, ForImages: d.ForImages, Create: d.Create,
		Preexisting:    d.Preexisting,
		Complete:       d.Complete,
		MaxBackingName: d.MaxBackingName, MaxBackingFormat: d.MaxBackingFormat, Amend: d.Amend,
		Measure: d.Measure,

		Open:  func(x *Opening, u any) (graph.Driver, error) { return d.Open(x, u.(O)) },
		Check: untyped(d.Check), Children: untyped(d.Children), Backing: untyped(d.Backing),
	}
	if d.Reopen != nil {
		a.Reopen = func(x graph.Driver, u any, g *graph.Options) (graph.Participant, error) {
			return d.Reopen(x, u.(O), g)
		}
	}
	if d.FromName != nil {
		a.FromName = func(name string) (any, error) { return d.FromName(name) }
	}
	if d.FromNames != nil {
		a.FromNames = func(name string, named func(string, bool) (types.BlockdevRef, error)) (any, error) {
			return d.FromNames(name, named)
		}
	}
	if d.Filename != nil {
		a.Filename = func(u any, child func(string) Names) string {
			o, _ := u.(O)
			return d.Filename(o, child)
		}
	}
	if d.Strong != nil {
		a.Strong = func(u any, add func(string, value.Value)) { d.Strong(u.(O), add) }
	}
	if d.FromFile != nil {
		a.FromFile = func(file types.BlockdevRef) any { return d.FromFile(file) }
	}
	if d.NewImage != nil {
		a.NewImage = func(u any, i *Image) any { return d.NewImage(u.(O), i) }
	}
	return a
}

func untyped[O, R any](f func(O) R) func(any) R {
	if f == nil {
		return nil
	}
	return func(u any) R { return f(u.(O)) }
}

// With opens the driver with these options.
func (d *Def[O]) With(u O) OpenFunc {
	return func(x *Opening) (graph.Driver, error) { return d.Open(x, u) }
}
