package arch

// Patterns are import paths below the module: "a" is a itself, "a/*" what is directly below it,
// "a/..." a and all below.

// leaves import nothing of ours but what stands here: they are pure, or are what everybody imports.
var leaves = map[string][]string{
	"schema/value":                 nil,
	"schema/types":                 {"schema/value"},                                                  // decoders and encoders work on values
	"events":                       {"schema/value", "events/trace", "events/clock", "events/panics"}, // an event's data are a value, encoded once
	"events/trace":                 {"events/panics"},
	"events/clock":                 {"events/panics"},
	"events/panics":                nil,
	"qmp/chardev/sockets":          {"graph/blk", "schema/types"}, // texts of errno; addresses
	"graph/blk":                    {"graph/bitmap"},              // a request may name one that does not record it
	"graph/perm":                   nil,
	"graph/bitmap":                 nil,
	"jobs/machine":                 nil,
	"jobs/visible":                 {"jobs/machine"}, // its verbs and states
	"blockdev/format/qcow2/layout": nil,
	"blockdev/crypto":              {"graph/blk", "schema/types"},                                       // memory of requests; names of ciphers and hashes
	"blockdev/crypto/luks":         {"blockdev/crypto", "graph/blk", "schema/types"},                    // texts of errno
	"blockdev/tlscreds":            {"blockdev/tlspsk", "blockdev/crypto", "graph/blk", "schema/types"}, // memory for keys; texts of errno; options
	"blockdev/tlspsk":              nil,
	"blockdev/vhostwire":           nil,
	"blockdev/nbdwire":             {"graph/blk"},                           // extents and errno of the protocol are those of the data plane
	"blockdev/virtio":              {"graph/blk", "blockdev/virtio/vanish"}, // data of requests; faults
	"blockdev/virtio/vanish":       nil,
}

// anyone but the leaves may import these.
var anyone = []string{"schema/types", "schema/value", "events", "events/trace", "graph/blk", "events/panics", "events/clock"}

// rule: what matches from may import what matches one of to. The first rule that matches from
// counts.
type rule struct {
	from string
	to   []string
}

var rules = []rule{
	{"cmd/qapigen", []string{"schema/model"}},
	{"cmd/man", nil},
	{"cmd/version", nil},
	// cmd/man: their tests write the manual pages with it; neither links it, see notLinked.
	{"cmd/qblockctl", []string{"cmd/qblockctl/*", "cmd/man", "cmd/version", "schema"}},
	{"cmd/qblockctl/*", nil},
	{"cmd/qblockd/cmdline", nil},
	{"cmd/qblockd", []string{"cmd/qblockd/cmdline", "cmd/man", "cmd/version", "schema", "qmp/...", "jobs/...", "blockdev", "blockdev/*",
		"blockdev/export/*", "graph/..."}},

	{"qmp/handlers", []string{"qmp", "qmp/chardev", "jobs", "jobs/*", "blockdev", "blockdev/export", "blockdev/export/nbd",
		"blockdev/object", "graph", "graph/perm", "graph/transaction", "schema"}}, // schema: query-qmp-schema and query-commands answer its bytes
	{"qmp/chardev", []string{"qmp/chardev/sockets", "blockdev/tlscreds"}},
	{"qmp", []string{"schema"}},

	{"jobs/copy", []string{"jobs", "graph", "graph/*"}},
	{"jobs/blockjob", []string{"jobs", "jobs/visible", "blockdev", "graph", "graph/*"}},
	// A commit of what is written to is a mirror.
	{"jobs/commit", []string{"jobs", "jobs/copy", "jobs/visible", "jobs/blockjob", "jobs/mirror", "blockdev", "graph", "graph/*"}},
	{"jobs/jobtest", []string{"jobs", "blockdev", "blockdev/drivers", "blockdev/drivertest", "blockdev/format/qcow2", "graph", "graph/*"}},
	{"jobs/*", []string{"jobs", "jobs/copy", "jobs/visible", "jobs/blockjob", "blockdev", "blockdev/filter/copybeforewrite", "graph", "graph/*"}},
	{"jobs", []string{"jobs/machine", "jobs/visible", "graph", "graph/transaction"}},

	{"blockdev/driver", []string{"blockdev/crypto", "graph", "graph/*"}}, // memory for secrets
	{"blockdev/drivers", []string{"blockdev/driver", "blockdev/protocol/*", "blockdev/format/*", "blockdev/filter/*"}},
	{"blockdev/drivertest", []string{"blockdev/driver", "graph", "graph/*"}},
	{"blockdev/format/luks", []string{"blockdev/driver", "blockdev/crypto", "blockdev/crypto/luks", "graph", "graph/*"}},
	{"blockdev/format/qcow2", []string{"blockdev/driver", "blockdev/format/qcow2/layout", "blockdev/crypto", "blockdev/crypto/luks", "graph", "graph/*"}},
	{"blockdev/export", []string{"graph", "graph/*"}}, // no type of exports: those are told to it
	{"blockdev/export/nbd", []string{"blockdev/export", "blockdev/nbdwire", "blockdev/tlscreds", "qmp/chardev/sockets", "graph", "graph/*"}},
	{"blockdev/export/vhostuser", []string{"blockdev/export", "blockdev/vhostwire", "blockdev/virtio", "qmp/chardev/sockets", "graph", "graph/*"}},
	{"blockdev/export/*", []string{"blockdev/export", "graph", "graph/*"}},
	{"blockdev/protocol/nbd", []string{"blockdev/driver", "blockdev/nbdwire", "blockdev/tlscreds", "qmp/chardev/sockets", "graph", "graph/*"}},
	{"blockdev/protocol/*", []string{"blockdev/driver", "graph", "graph/*"}}, // never one another
	{"blockdev/format/*", []string{"blockdev/driver", "graph", "graph/*"}},
	{"blockdev/filter/*", []string{"blockdev/driver", "graph", "graph/*"}},
	// An object is what the filters share, and what connections are encrypted by.
	{"blockdev/object", []string{"blockdev/filter/throttle", "blockdev/tlscreds", "blockdev/crypto"}},
	{"blockdev/tlscreds/certs", nil},
	{"blockdev/virtio/virtiotest", []string{"blockdev/virtio"}},
	{"blockdev/*", []string{"graph", "graph/*"}},
	{"blockdev", []string{"blockdev/driver", "graph", "graph/*"}}, // no driver: those are told to it

	{"graph/transaction", []string{"graph"}},
	{"graph", []string{"graph/perm", "graph/bitmap"}},

	{"schema/check", []string{"schema"}},
	{"schema/model", nil},
	{"schema", nil},

	{"tests/conv", []string{"tests/conv/player", "schema"}}, // schema: which needs of listed conversations are met
	{"tests/...", []string{"..."}},
}

// testOnly packages are imported by tests alone.
var testOnly = []string{"blockdev/drivertest", "blockdev/tlscreds/certs", "blockdev/virtio/virtiotest", "jobs/jobtest", "tests/..."}

// thirdParty: module prefix -> where it may be imported, in the code and in tests.
var thirdParty = []struct {
	module      string
	code, tests []string
}{
	{"github.com/digitalocean/go-qemu/qapi-schema", []string{"cmd/qapigen"}, []string{"cmd/qapigen"}},
	// Its client loses the error class, fails on numeric ids and has a data race: a peer to test
	// with, no more.
	{"github.com/digitalocean/go-qemu/qmp", nil, []string{"tests/interop"}},
	{"github.com/santhosh-tekuri/jsonschema/v5", []string{"schema/check"}, []string{"schema/check"}},
	{"github.com/klauspost/compress", []string{"blockdev/format/qcow2"}, []string{"blockdev/format/qcow2"}},
	{"github.com/lmittmann/tint", []string{"cmd/qblockd"}, nil},
	// Its ciphers of long ago, and what tests compare ours with.
	{"golang.org/x/crypto", []string{"blockdev/crypto", "blockdev/tlspsk"}, []string{"blockdev/crypto", "blockdev/tlspsk"}},
	{"golang.org/x/sys", []string{"blockdev/crypto", "blockdev/object", "blockdev/tlscreds", "blockdev/protocol/file", "blockdev/protocol/nbd", "blockdev/export/...", "blockdev/virtio/virtiotest", "qmp", "qmp/chardev", "qmp/chardev/sockets", "cmd/*"}, []string{"..."}},
	{"github.com/spf13/cobra", []string{"cmd/qblockctl"}, nil},
	{"github.com/spf13/pflag", nil, []string{"cmd/qblockctl"}}, // the options of cobra's commands, for the manual page
	{"github.com/peterh/liner", []string{"cmd/qblockctl"}, nil},
	{"github.com/vbauerster/mpb/v8", []string{"cmd/qblockctl"}, nil},
	// A file system that answers late or never, to hang a node on.
	{"github.com/hanwen/go-fuse/v2", nil, []string{"tests/interop"}},
	// Looks for an order of concurrent commands that explains what came of them: a second opinion
	// on short histories.
	{"github.com/anishathalye/porcupine", nil, []string{"tests/storm"}},
	{"github.com/google/go-cmp", nil, []string{"..."}},
	{"pgregory.net/rapid", nil, []string{"..."}},
	{"go.uber.org/goleak", nil, []string{"..."}},
}

// notLinked are packages that the daemon must not contain: they cost time at start, or are for
// tests and tools.
var notLinked = []string{
	"testing", "flag",
	"github.com/santhosh-tekuri/jsonschema/v5", "github.com/digitalocean/go-qemu/qapi-schema",
	"github.com/spf13/cobra", "github.com/peterh/liner", "github.com/vbauerster/mpb/v8", "qblockd/cmd/man",
	"qblockd/schema/check", "qblockd/schema/model", "qblockd/blockdev/drivertest",
}

// maxInit is what one package of ours may cost at start, in milliseconds.
const maxInit = 0.2
