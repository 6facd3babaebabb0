package blockdev

import (
	"fmt"
	"reflect"
	"slices"

	"qblockd/blockdev/filter/blkdebug"
	"qblockd/blockdev/filter/blklogwrites"
	"qblockd/blockdev/filter/blkverify"
	"qblockd/blockdev/filter/compress"
	"qblockd/blockdev/filter/copybeforewrite"
	"qblockd/blockdev/filter/copyonread"
	"qblockd/blockdev/filter/preallocate"
	"qblockd/blockdev/filter/snapshotaccess"
	"qblockd/blockdev/filter/throttle"
	"qblockd/blockdev/format/qcow2"
	"qblockd/blockdev/format/raw"
	"qblockd/blockdev/protocol/file"
	"qblockd/blockdev/protocol/null"
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
	// OpenWith makes Open for drivers that need objects of object-add; nil for others.
	OpenWith func(Objects) graph.OpenFunc

	// ForImages: the header of an image may name nodes of the driver as its backing file. It only reads what its children and its file have,
	// and does nothing else that a stranger should not be able to make the daemon do. ImageOptions are the options
	// besides children that count there, as they say what is read; ImageHints may be given, but say only how, which is not for an image to decide.
	ForImages    bool
	ImageOptions []string
	ImageHints   []string

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
	// NameAround is the exact file name of a filter around those of its children; "" if options do not go into it. Nil for those that have none.
	NameAround func(u any, child func(name string) string) string
	// Changeable are the options that a reopen may change; true: and leave out. Of those with members it is the first part of their names.
	Changeable map[string]bool
	// PlainName is the file name of a node without strong options; nil: that of its file, if any.
	PlainName func(u any) string
}

// Objects finds objects of object-add.
type Objects interface {
	// ThrottleGroup is nil if there is none of that name.
	ThrottleGroup(name string) *throttle.Group
}

// noObjects is where there are no objects.
type noObjects struct{}

func (noObjects) ThrottleGroup(string) *throttle.Group { return nil }

// ChildOption is a child that a driver's options name.
type ChildOption struct {
	Name string
	Role perm.Role
	Ref  *types.BlockdevRef
}

// Drivers is what is compiled in.
func Drivers() []Driver {
	return []Driver{
		blkdebugDriver(blkdebug.Open),
		blklogwritesDriver(),
		blkverifyDriver(),
		{
			Name: types.BlockdevDriverCopyBeforeWrite, Kind: graph.Filter, Open: copybeforewrite.Open,
			Children: func(u any) []ChildOption {
				o := u.(*types.BlockdevOptionsCbw)
				return append(filtered(&o.File), ChildOption{"target", perm.Data, &o.Target})
			},
		},
		{
			Name: types.BlockdevDriverCompress, Kind: graph.Filter, Open: compress.Open, ForImages: true, // reading passes it
			Children: func(u any) []ChildOption {
				return filtered(&u.(*types.BlockdevOptionsGenericFormat).File)
			},
		},
		{
			Name: types.BlockdevDriverCopyOnRead, Kind: graph.Filter, Open: copyonread.Open,
			Children: func(u any) []ChildOption {
				return filtered(&u.(*types.BlockdevOptionsCor).File)
			},
		},
		fileDriver(types.BlockdevDriverFile, file.Open),
		fileDriver(types.BlockdevDriverHostDevice, file.OpenHostDevice),
		nullDriver(types.BlockdevDriverNullAio, null.Open),
		nullDriver(types.BlockdevDriverNullCo, null.Open),
		{
			Name: types.BlockdevDriverPreallocate, Kind: graph.Filter, Open: preallocate.Open,
			Children: func(u any) []ChildOption {
				return filtered(&u.(*types.BlockdevOptionsPreallocate).File)
			},
			Changeable: map[string]bool{"prealloc-align": false, "prealloc-size": false},
		},
		qcow2Driver(qcow2.Open),
		rawDriver(raw.Open),
		throttleDriver(),
		{
			Name: types.BlockdevDriverSnapshotAccess, Kind: graph.Format, Open: snapshotaccess.Open,
			Children: func(u any) []ChildOption {
				return []ChildOption{{"file", perm.Data | perm.Primary, &u.(*types.BlockdevOptionsGenericFormat).File}}
			},
		},
	}
}

// filtered is the one child of most filters.
func filtered(file *types.BlockdevRef) []ChildOption {
	return []ChildOption{{"file", perm.Filtered | perm.Primary, file}}
}

// The functions below say what the options of each driver mean, apart from the driver itself.

func fileDriver(name types.BlockdevDriver, open graph.OpenFunc) Driver {
	filename := func(u any) string { return u.(*types.BlockdevOptionsFile).Filename }
	return Driver{
		Name: name, Kind: graph.Protocol, Open: open,
		Prefix: string(name),
		FromName: func(s string) (any, error) {
			return &types.BlockdevOptionsFile{Filename: stripPrefix(s, string(name)+":")}, nil
		},
		File: filename, PlainName: filename,
		ForImages: true, ImageOptions: []string{"filename", "locking"}, // devices if the policy allows them
		ImageHints: []string{"aio", "aio-max-batch", "drop-cache", "x-check-cache-dropped"},
		Changeable: map[string]bool{"drop-cache": false, "x-check-cache-dropped": true},
	}
}

func nullDriver(name types.BlockdevDriver, open graph.OpenFunc) Driver {
	plain := string(name) + "://"
	return Driver{
		Name: name, Kind: graph.Protocol, Open: open,
		Prefix:    string(name),
		ForImages: true, ImageOptions: []string{"size", "read-zeroes"}, ImageHints: []string{"latency-ns"},
		FromName: func(s string) (any, error) {
			if s != plain {
				return nil, fmt.Errorf("The only allowed filename for this driver is '%s'", plain)
			}
			return &types.BlockdevOptionsNull{}, nil
		},
		Strong: func(u any, add func(string, value.Value)) {
			o := u.(*types.BlockdevOptionsNull)
			if o.Size != nil {
				add("size", *o.Size)
			}
			if o.ReadZeroes != nil {
				add("read-zeroes", *o.ReadZeroes)
			}
		},
		PlainName: func(any) string { return plain },
	}
}

func blkdebugDriver(open graph.OpenFunc) Driver {
	return Driver{
		Name: types.BlockdevDriverBlkdebug, Kind: graph.Filter, Open: open,
		Children: func(u any) []ChildOption {
			return []ChildOption{{"image", perm.Filtered | perm.Primary, &u.(*types.BlockdevOptionsBlkdebug).Image}}
		},
		NameAround: func(u any, child func(name string) string) string {
			o := u.(*types.BlockdevOptionsBlkdebug)
			config := ""
			set(&config, o.Config)
			if plain := (types.BlockdevOptionsBlkdebug{Image: o.Image, Config: o.Config, TakeChildPerms: o.TakeChildPerms, UnshareChildPerms: o.UnshareChildPerms}); !reflect.DeepEqual(*o, plain) {
				return ""
			}
			image := child("image")
			if image == "" {
				return ""
			}
			return "blkdebug:" + config + ":" + image
		},
		Strong: func(u any, add func(string, value.Value)) {
			o := *u.(*types.BlockdevOptionsBlkdebug)
			v, err := value.Parse(string(o.AppendJSON(nil)))
			if err != nil {
				panic("blockdev: " + err.Error())
			}
			for _, m := range v.(*value.Dict).Members() {
				switch m.Name {
				case "image", "take-child-perms", "unshare-child-perms":
				case "inject-error", "set-state":
					for i, r := range slices.Backward(m.Value.(value.List)) { // the earlier one is printed first
						for _, x := range slices.Backward(r.(*value.Dict).Members()) {
							add(fmt.Sprintf("%s.%d.%s", m.Name, i, x.Name), x.Value)
						}
					}
				default:
					add(m.Name, m.Value)
				}
			}
		},
	}
}

func blklogwritesDriver() Driver {
	return Driver{
		Name: types.BlockdevDriverBlklogwrites, Kind: graph.Filter, Open: blklogwrites.Open,
		Children: func(u any) []ChildOption {
			o := u.(*types.BlockdevOptionsBlklogwrites)
			return append(filtered(&o.File), ChildOption{"log", perm.Metadata, &o.Log})
		},
		Strong: func(u any, add func(string, value.Value)) {
			o := u.(*types.BlockdevOptionsBlklogwrites)
			if o.LogAppend != nil {
				add("log-append", *o.LogAppend)
			}
			if o.LogSectorSize != nil {
				add("log-sector-size", uint64(*o.LogSectorSize))
			}
		},
	}
}

func blkverifyDriver() Driver {
	return Driver{
		Name: types.BlockdevDriverBlkverify, Kind: graph.Filter, Open: blkverify.Open,
		Children: func(u any) []ChildOption {
			o := u.(*types.BlockdevOptionsBlkverify)
			return []ChildOption{{"raw", perm.Filtered | perm.Primary, &o.Raw}, {"test", perm.Data, &o.Test}}
		},
		NameAround: func(_ any, child func(name string) string) string {
			raw, test := child("raw"), child("test")
			if raw == "" || test == "" {
				return ""
			}
			return "blkverify:" + raw + ":" + test
		},
	}
}

func throttleDriver() Driver {
	return Driver{
		Name: types.BlockdevDriverThrottle, Kind: graph.Filter,
		OpenWith: func(o Objects) graph.OpenFunc { return throttle.Opener(o.ThrottleGroup) },
		Children: func(u any) []ChildOption {
			return filtered(&u.(*types.BlockdevOptionsThrottle).File)
		},
		ForImages: true, ImageOptions: []string{"throttle-group"}, // if the policy allows references
		Changeable: map[string]bool{"throttle-group": false},
		Strong: func(u any, add func(string, value.Value)) {
			add("throttle-group", u.(*types.BlockdevOptionsThrottle).ThrottleGroup)
		},
	}
}

func rawDriver(open graph.OpenFunc) Driver {
	return Driver{
		Name: types.BlockdevDriverRaw, Kind: graph.Format, Open: open,
		ForImages: true, ImageOptions: []string{"offset", "size"},
		FromFile: func(f types.BlockdevRef) any { return &types.BlockdevOptionsRaw{File: f} },
		Probe:    func([]byte) int { return rawScore },
		Children: func(u any) []ChildOption {
			o := u.(*types.BlockdevOptionsRaw)
			return []ChildOption{{"file", raw.Role(o), &o.File}}
		},
		Changeable: map[string]bool{"offset": true, "size": true},
		Strong: func(u any, add func(string, value.Value)) {
			o := u.(*types.BlockdevOptionsRaw)
			if o.Offset != nil {
				add("offset", *o.Offset)
			}
			if o.Size != nil {
				add("size", *o.Size)
			}
		},
	}
}

func qcow2Driver(open graph.OpenFunc) Driver {
	return Driver{
		Name: types.BlockdevDriverQcow2, Kind: graph.Format, Open: open,
		ForImages: true,
		ImageHints: []string{
			"lazy-refcounts", "pass-discard-request", "pass-discard-snapshot", "pass-discard-other", "discard-no-unref", "overlap-check",
			"cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size", "cache-clean-interval",
		},
		FromFile: func(f types.BlockdevRef) any { return &types.BlockdevOptionsQcow2{File: f} },
		Probe: func(header []byte) int {
			if qcow2.Probe(header) {
				return 100
			}
			return 0
		},
		Children: func(u any) []ChildOption {
			return []ChildOption{{"file", perm.Image, &u.(*types.BlockdevOptionsQcow2).File}}
		},
		Backing: func(u any) *types.BlockdevRefOrNull { return u.(*types.BlockdevOptionsQcow2).Backing },
		Changeable: map[string]bool{
			"lazy-refcounts": true, "pass-discard-request": true, "pass-discard-snapshot": true, "pass-discard-other": true,
			"discard-no-unref": true, "overlap-check": true, "cache-size": true, "l2-cache-size": true, "l2-cache-entry-size": true,
			"refcount-cache-size": true, "cache-clean-interval": true,
		},
	}
}
