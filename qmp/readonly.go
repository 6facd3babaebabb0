package qmp

// readOnly are the commands that change nothing of the daemon, of its nodes and of what they have:
// all that a read-only monitor takes. What is not listed is taken for one that does. ringbuf-read
// is not here, since what it returns is gone then; quit is not, of course.
var readOnly = map[string]bool{
	"qmp_capabilities": true, // changes the session alone

	"qom-get":             true, // nobody can read secrets by it
	"qom-list":            true,
	"qom-list-properties": true,
	"qom-list-types":      true,

	"query-block":             true,
	"query-block-exports":     true,
	"query-block-jobs":        true,
	"query-blockstats":        true,
	"query-chardev":           true,
	"query-chardev-backends":  true,
	"query-commands":          true,
	"query-jobs":              true,
	"query-named-block-nodes": true,
	"query-qmp-schema":        true,
	"query-version":           true,

	"x-debug-block-dirty-bitmap-sha256": true,
	"x-debug-query-block-graph":         true,
}
