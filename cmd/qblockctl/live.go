package main

import (
	"context"
	"slices"
	"strings"

	"qblockd/cmd/qblockctl/introspect"
)

// liveSchema asks the daemon for its schema; where that fails it returns the one that is built in.
func liveSchema(ctx context.Context, c *client) *introspect.Schema {
	if text, err := c.execute(ctx, "query-qmp-schema", nil); err == nil {
		if s, err := introspect.Parse(text); err == nil {
			return s
		}
	}
	return builtin()
}

// liveNames returns the names of that kind which the daemon knows now; none where it cannot be
// asked.
func liveNames(ctx context.Context, c *client, k kind, prefix string) (l []string) {
	type named struct {
		ID    string
		Label string
		Name  string
		Type  string
		Node  string `json:"node-name"`
	}
	ask := func(command string, arguments any, name func(named) string) {
		all, err := query[[]named](ctx, c, command, arguments)
		if err != nil {
			return
		}
		for _, n := range all {
			if s := name(n); s != "" {
				l = append(l, s)
			}
		}
	}
	children := func(path, before string) {
		ask("qom-list", map[string]any{"path": path}, func(n named) string {
			if !strings.HasPrefix(n.Type, "child<") {
				return ""
			}
			return before + n.Name
		})
	}
	switch k {
	case kindNode:
		ask("query-named-block-nodes", map[string]any{"flat": true}, func(n named) string { return n.Node })
	case kindJob:
		ask("query-jobs", nil, func(n named) string { return n.ID })
	case kindExport:
		ask("query-block-exports", nil, func(n named) string { return n.ID })
	case kindChardev:
		ask("query-chardev", nil, func(n named) string { return n.Label })
	case kindObject:
		children("/objects", "")
	case kindPath:
		dir := "/" + strings.TrimPrefix(prefix[:strings.LastIndexByte(prefix, '/')+1], "/")
		children(dir, dir)
	case kindFile:
		l = files(prefix)
	}
	slices.Sort(l)
	return l
}
