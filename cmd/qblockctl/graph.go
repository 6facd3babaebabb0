package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"qblockd/cmd/qblockctl/picture"
)

func (a *app) graphCommand() *cobra.Command {
	var format, output string
	cmd := &cobra.Command{
		Use:                   "graph [--format FORMAT] [--output FILE]",
		DisableFlagsInUseLine: true,
		Short:                 "draw the block nodes, and the exports and jobs that use them",
		Long: "Draws who uses which block node: exports and jobs on top, what they use below. As a tree of text, in the language of\n" +
			"Graphviz, or as an SVG picture: 'qblockctl graph -o graph.svg'.",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			draw, err := drawer(format, output)
			if err != nil {
				return err
			}
			return a.graph(cmd.Context(), draw, output)
		},
	}
	cmd.Flags().StringVarP(&format, "format", "f", "", "`FORMAT` of the picture: text, dot or svg; by default what --output ends in (.txt, .dot, .svg), else text")
	cmd.Flags().StringVarP(&output, "output", "o", "", "write it to `FILE`")
	_ = cmd.RegisterFlagCompletionFunc("format", // fails for flags that do not exist
		func(_ *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
			return begins([]string{"dot", "svg", "text"}, word), cobra.ShellCompDirectiveNoFileComp
		})
	return cmd
}

// graph draws the daemon's graph, to a file if output names one.
func (a *app) graph(ctx context.Context, draw func(io.Writer, *picture.Graph) error, output string) error {
	c, err := dial(ctx, a.socket, nil)
	if err != nil {
		return err
	}
	defer c.close()
	g, err := fetchGraph(ctx, c)
	if err != nil {
		return err
	}
	if output == "" {
		return draw(a.out, g)
	}
	var b bytes.Buffer
	if err := draw(&b, g); err != nil {
		return err
	}
	return os.WriteFile(output, b.Bytes(), 0o666)
}

// drawer is what draws in a format; without one, in that which the name of the file output ends in.
func drawer(format, output string) (func(io.Writer, *picture.Graph) error, error) {
	extension := filepath.Ext(output)
	switch {
	case format == "text", format == "" && (extension == "" || extension == ".txt"):
		return picture.Text, nil
	case format == "dot", format == "" && extension == ".dot":
		return picture.Dot, nil
	case format == "svg", format == "" && extension == ".svg":
		return picture.SVG, nil
	case format == "":
		return nil, usage("graph", "'%s' is not a name in .svg, .dot or .txt; --format says what it is to be", output)
	}
	return nil, usage("graph", "'%s' is not text, dot or svg", format)
}

// What the daemon says about its graph; only what is drawn.
type (
	debugGraph struct {
		Nodes []struct {
			ID         int64
			Type, Name string
		}
		Edges []struct {
			Parent, Child int64
			Name          string
			Perm          []string
			Shared        []string `json:"shared-perm"`
		}
	}
	nodeInfo struct {
		Name      string `json:"node-name"`
		Drv       string
		RO        bool
		Encrypted bool
		Active    *bool // where it has been inactive
		File      string
		Threshold int64 `json:"write_threshold"`
		Bitmaps   []struct {
			Name string
		} `json:"dirty-bitmaps"`
		Image struct {
			Size   int64  `json:"virtual-size"`
			Actual *int64 `json:"actual-size"`
		}
	}
	exportInfo struct {
		ID, Type     string
		Node         string `json:"node-name"`
		ShuttingDown bool   `json:"shutting-down"`
		IoStatus     string `json:"x-qblockd-io-status"` // empty where there is no option about errors
	}
)

// fetchGraph asks the daemon for its nodes, who uses them, its exports and jobs.
func fetchGraph(ctx context.Context, c *client) (*picture.Graph, error) {
	raw, err := query[debugGraph](ctx, c, "x-debug-query-block-graph", nil)
	if err != nil {
		return nil, err
	}
	nodes, err := query[[]nodeInfo](ctx, c, "query-named-block-nodes", map[string]any{"flat": true})
	if err != nil {
		return nil, err
	}
	exports, err := query[[]exportInfo](ctx, c, "query-block-exports", nil)
	if err != nil {
		return nil, err
	}
	jobs, err := fetchJobs(ctx, c)
	if err != nil {
		return nil, err
	}
	return drawn(raw, nodes, exports, jobs), nil
}

// drawn makes a picture's graph of the answers. Exports are anonymous roots in the daemon's graph:
// each takes, in the order of the exports, a root of its own on its node.
func drawn(raw debugGraph, nodes []nodeInfo, exports []exportInfo, jobs []jobInfo) *picture.Graph {
	g := &picture.Graph{}
	at := map[int64]int{}
	info := map[string]*nodeInfo{}
	for i := range nodes {
		info[nodes[i].Name] = &nodes[i]
	}
	hasChild := map[int64]bool{}
	for _, e := range raw.Edges {
		hasChild[e.Parent] = true
	}
	// Users first, then nodes; the daemon lists what is newest first.
	raw.Nodes = slices.Clone(raw.Nodes)
	slices.Reverse(raw.Nodes)
	for _, users := range []bool{true, false} {
		for _, n := range raw.Nodes {
			if (n.Type != "block-driver") != users {
				continue
			}
			at[n.ID] = len(g.Nodes)
			g.Nodes = append(g.Nodes, drawnNode(n.Type, n.Name, info[n.Name], hasChild[n.ID], jobs))
		}
	}
	exports = slices.Clone(exports)
	for _, e := range raw.Edges {
		from, ok1 := at[e.Parent]
		to, ok2 := at[e.Child]
		if !ok1 || !ok2 {
			continue
		}
		g.Edges = append(g.Edges, picture.Edge{From: from, To: to, Name: e.Name,
			Tip: "needs: " + words(e.Perm) + "\nshares: " + words(e.Shared)})
		if p := &g.Nodes[from]; p.Kind == picture.Root && p.Name == "" {
			i := slices.IndexFunc(exports, func(x exportInfo) bool { return x.Node == g.Nodes[to].Name })
			if i >= 0 {
				p.Kind, p.Label, p.Name, p.Traits = picture.Export, "export", exports[i].ID, []string{exports[i].Type}
				if slices.Contains(e.Perm, "write") {
					p.Traits = append(p.Traits, "writable")
				}
				if exports[i].ShuttingDown {
					p.Traits = append(p.Traits, "shutting down")
				}
				if s := exports[i].IoStatus; s != "" && s != "ok" {
					p.Traits = append(p.Traits, "stopped: "+s)
				}
				exports = slices.Delete(exports, i, i+1)
			}
		}
	}
	return g
}

func words(l []string) string {
	if len(l) == 0 {
		return "nothing"
	}
	return strings.Join(l, ", ")
}

func drawnNode(kind, name string, info *nodeInfo, hasChild bool, jobs []jobInfo) picture.Node {
	switch {
	case kind == "block-job":
		n := picture.Node{Kind: picture.Job, Label: "job", Name: name}
		for i := range jobs {
			if j := &jobs[i]; j.ID == name {
				n.Label = "job " + j.Type
				n.Traits = []string{j.Status, j.percent()}
			}
		}
		return n
	case kind != "block-driver":
		n := picture.Node{Kind: picture.Root, Label: "backend", Name: name}
		if name == "" {
			n.Label = "user"
		}
		return n
	}
	n := picture.Node{Kind: picture.Protocol, Name: name}
	if hasChild {
		n.Kind = picture.Format
	}
	if info == nil {
		return n
	}
	n.Traits = []string{info.Drv, size(info.Image.Size)}
	if info.RO {
		n.Traits = append(n.Traits, "read-only")
	}
	if info.Active != nil && !*info.Active {
		n.Traits = append(n.Traits, "inactive")
	}
	if info.Encrypted {
		n.Traits = append(n.Traits, "encrypted")
	}
	for _, b := range info.Bitmaps {
		if b.Name != "" { // else it is a job's
			n.Traits = append(n.Traits, "bitmap "+b.Name)
		}
	}
	if !hasChild && !strings.HasPrefix(info.File, info.Drv+":") && !strings.HasPrefix(info.File, "json:") {
		n.File = info.File
	}
	n.Tip = info.File
	if info.Image.Actual != nil {
		n.Tip += "\ntakes " + size(*info.Image.Actual)
	}
	if info.Threshold > 0 {
		n.Tip += "\nwrite threshold at " + size(info.Threshold)
	}
	return n
}
