package handlers

import (
	"context"
	"errors"
	"strings"
	"testing"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/drivertest"
	"qblockd/jobs"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// commands collects the handlers that are registered.
type commands map[string]types.HandlerFunc

func (c commands) Handle(name string, f types.HandlerFunc) { c[name] = f }

// say executes a command and returns the reply, or "class: desc".
func (c commands) say(t *testing.T, name, args string) string {
	t.Helper()
	v, err := value.Parse(args)
	if err != nil {
		t.Fatal(err)
	}
	out, err := c[name](context.Background(), v.(*value.Dict), nil)
	if err == nil {
		return string(out)
	}
	class := "GenericError"
	var q interface{ QMPClass() string }
	if errors.As(err, &q) {
		class = q.QMPClass()
	}
	return class + ": " + err.Error()
}

// Each command: a success and its own errors.
func TestBlockCore(t *testing.T) {
	c := commands{}
	nodes := blockdev.New(drivertest.NewGraph(t), blockdev.Config{Drivers: drivers.All})
	types.RegisterBlockCore(c, BlockCore{Nodes: nodes, Jobs: jobs.NewManager(&drivertest.Sink{}, nil)})
	for _, s := range []struct{ command, args, want string }{
		{"query-block", `{}`, `[]`},
		{"query-blockstats", `{}`, `[]`},
		{"query-blockstats", `{'query-nodes': false}`, `[]`},
		{"query-named-block-nodes", `{}`, `[]`},
		{"x-debug-query-block-graph", `{}`, `{"edges": [], "nodes": []}`},
		{"blockdev-add", `{'driver': 'null-co', 'node-name': 'n', 'size': 1000}`, `{}`},
		{"blockdev-add", `{'driver': 'null-co', 'node-name': 'n'}`, `GenericError: Duplicate nodes with node-name='n'`},
		{"blockdev-add", `{'driver': 'null-co', 'node-name': 5}`, `GenericError: Invalid parameter type for 'node-name', expected: string`},
		{"blockdev-add", `{'driver': 'raw', 'node-name': 'r', 'file': 'n'}`, `{}`},
		{"x-debug-query-block-graph", `{}`, `{"edges": [{"name": "file", "parent": 2, "shared-perm": ["resize", "write-unchanged", "write", "consistent-read"], "perm": [], "child": 1}], ` +
			`"nodes": [{"name": "r", "type": "block-driver", "id": 2}, {"name": "n", "type": "block-driver", "id": 1}]}`},
		{"block_resize", `{'node-name': 'n', 'size': 512}`, `GenericError: Image format driver does not support resize`},
		{"block_resize", `{'device': 'n', 'size': 512}`, `GenericError: Cannot find device='n' nor node-name=''`},
		{"block_resize", `{'node-name': 'n', 'size': -1}`, `GenericError: Parameter 'size' expects a >0 size`},
		{"block-set-write-threshold", `{'node-name': 'n', 'write-threshold': -1}`, `{}`},
		{"block-set-write-threshold", `{'node-name': 'x', 'write-threshold': 1}`, `GenericError: Device 'x' not found`},
		{"query-named-block-nodes", `{'flat': true}`, `[{"iops_rd": 0, "detect_zeroes": "off", "image": {"virtual-size": 1024, ` +
			`"filename": "json:{\"driver\": \"raw\", \"file\": {\"driver\": \"null-co\", \"size\": 1000}}", "format": "raw", "actual-size": 0}, ` +
			`"iops_wr": 0, "ro": false, "node-name": "r", "backing_file_depth": 0, "drv": "raw", "iops": 0, "bps_wr": 0, "write_threshold": 0, "encrypted": false, "bps": 0, "bps_rd": 0, ` +
			`"cache": {"no-flush": false, "direct": false, "writeback": true}, "file": "json:{\"driver\": \"raw\", \"file\": {\"driver\": \"null-co\", \"size\": 1000}}"}, ` +
			`{"iops_rd": 0, "detect_zeroes": "off", "image": {"virtual-size": 1024, "filename": "json:{\"driver\": \"null-co\", \"size\": 1000}", "format": "null-co", "actual-size": 0}, ` +
			`"iops_wr": 0, "ro": false, "node-name": "n", "backing_file_depth": 0, "drv": "null-co", "iops": 0, "bps_wr": 0, "write_threshold": -1, "encrypted": false, "bps": 0, "bps_rd": 0, ` +
			`"cache": {"no-flush": false, "direct": false, "writeback": true}, "file": "json:{\"driver\": \"null-co\", \"size\": 1000}"}]`},
		{"blockdev-del", `{'node-name': 'n'}`, `GenericError: Block device n is in use`},
		{"blockdev-del", `{'node-name': 'x'}`, `GenericError: Failed to find node with node-name='x'`},
		{"blockdev-del", `{'node-name': 'r'}`, `{}`},
		{"blockdev-del", `{'node-name': 'n'}`, `{}`},
		{"query-named-block-nodes", `{'flat': false}`, `[]`},
	} {
		if got := c.say(t, s.command, s.args); got != s.want {
			t.Errorf("%s %s: got\n%s\nwant\n%s", s.command, s.args, got, s.want)
		}
	}
	c.say(t, "blockdev-add", `{'driver': 'null-co', 'node-name': 'n'}`)
	if got := c.say(t, "query-blockstats", `{'query-nodes': true}`); !strings.HasPrefix(got, `[{"stats": {"unmap_operations": 0, `) || !strings.HasSuffix(got, `, "node-name": "n"}]`) {
		t.Errorf("query-blockstats: %s", got)
	}
}
