package blockdev

import (
	"qblockd/blockdev/file"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Driver is a driver as the registry knows it. Functions that take u get the driver's branch of
// BlockdevOptions.
type Driver struct {
	Name types.BlockdevDriver
	Kind graph.Kind
	Open graph.OpenFunc

	// Prefix selects the driver in a file name "PREFIX:..."; "" if none does.
	Prefix string
	// FromName makes the branch for a file name with or without its prefix; nil for drivers without file names.
	FromName func(name string) (any, error)
	// FromFile makes the branch of a format that is told nothing but its file; nil for others.
	FromFile func(file types.BlockdevRef) any
	// Probe rates how well the first bytes of a file fit, 0 to 100; nil for drivers that are never guessed.
	Probe func(header []byte) int

	// Children are the children that the options name, but the backing file; nil if there are none.
	Children func(u any) []ChildOption
	// Backing is the option of that name; nil for drivers that have no backing file.
	Backing func(u any) *types.BlockdevRefOrNull

	// File is the option "filename"; nil if there is none.
	File func(u any) string
	// Strong calls add for the given options, beyond driver and filename, that matter for what is read and written.
	Strong func(u any, add func(name string, v value.Value))
	// PlainName is the file name of a node without strong options; nil: that of its file, if any.
	PlainName func(u any) string
}

// ChildOption is a child that a driver's options name.
type ChildOption struct {
	Name string
	Role perm.Role
	Ref  *types.BlockdevRef
}

// Drivers is what is compiled in.
func Drivers() []Driver {
	return []Driver{
		{
			Name: types.BlockdevDriverFile, Kind: graph.Protocol, Open: file.Open,
			Prefix: "file", FromName: fileFromName("file:"), File: fileName, PlainName: fileName,
		},
		{
			Name: types.BlockdevDriverHostDevice, Kind: graph.Protocol, Open: file.OpenHostDevice,
			Prefix: "host_device", FromName: fileFromName("host_device:"), File: fileName, PlainName: fileName,
		},
	}
}

func fileName(u any) string { return u.(*types.BlockdevOptionsFile).Filename }

func fileFromName(prefix string) func(string) (any, error) {
	return func(name string) (any, error) {
		return &types.BlockdevOptionsFile{Filename: stripPrefix(name, prefix)}, nil
	}
}
