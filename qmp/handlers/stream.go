package handlers

import (
	"context"
	"fmt"

	"qblockd/blockdev"
	"qblockd/graph"
	"qblockd/jobs/chain"
	"qblockd/jobs/stream"
	"qblockd/qmp"
	"qblockd/schema/types"
)

// Nodes finds nodes as the commands name them; *blockdev.Manager is one.
type Nodes interface {
	// Lookup finds a node by the name of a device or of the node itself; the error has the reference's words.
	Lookup(device, nodeName *string) (*graph.Node, error)
	// LookupIn is Lookup of a node by a device or node name as it is once tx is committed.
	LookupIn(tx *graph.Tx, name string) (*graph.Node, error)
	// LookupRoot is Lookup of a node that nothing but devices and exports uses.
	LookupRoot(name string) (*graph.Node, error)
	// Filename is the node's name as queries show it.
	Filename(n *graph.Node) string
	// HeaderName is how the header of an image names n as its backing file, and the format, as tx would leave the graph or, if it is nil, as it is.
	HeaderName(tx *graph.Tx, n *graph.Node) (name, format string, err error)
	// FindBacking is the node in the backing chain of top whose image has that file name, or nil.
	FindBacking(top *graph.Node, file string) *graph.Node
	// OpenImage opens an image by its file name, or makes it, for a command that then publishes it.
	OpenImage(ctx context.Context, i blockdev.OpenImage) (*blockdev.Opened, error)
	// OpenBacking opens what the header of n's image names as its backing file; nil if it names none.
	OpenBacking(ctx context.Context, n *graph.Node) (*blockdev.Opened, error)
}

// BlockStream implements types.BlockJobHandler.
func (h BlockJob) BlockStream(ctx context.Context, a *types.BlockStreamArgs) error {
	if err := exclusive("base", a.Base, "base-node", a.BaseNode); err != nil {
		return err
	}
	if err := exclusive("base", a.Base, "bottom", a.Bottom); err != nil {
		return err
	}
	if err := exclusive("bottom", a.Bottom, "base-node", a.BaseNode); err != nil {
		return err
	}
	args := stream.Args{
		OnError: types.BlockdevOnErrorReport, HeaderName: h.headerName,
		ID: deref(a.JobID), BackingFile: deref(a.BackingFile), Speed: deref(a.Speed),
		ManualFinalize: isFalse(a.AutoFinalize), ManualDismiss: isFalse(a.AutoDismiss),
		MaskProtocol: deref(a.BackingMaskProtocol),
	}
	if a.OnError != nil {
		args.OnError = *a.OnError
	}
	hold, err := h.Graph.Hold(ctx, func() ([]*graph.Node, error) { return h.streamNodes(&args, a) })
	if err != nil {
		return err
	}
	defer hold.Release()
	args.Hold = hold
	release, err := stream.Start(ctx, h.Jobs, args)
	if err != nil {
		return err
	}
	qmp.AfterReply(ctx, release)
	return nil
}

func (h BlockJob) headerName(n *graph.Node) (name, format string, err error) {
	return h.Nodes.HeaderName(nil, n)
}

// streamNodes finds the nodes of block-stream, fills in those of args, and checks what clients are told first.
func (h BlockJob) streamNodes(args *stream.Args, a *types.BlockStreamArgs) (nodes []*graph.Node, err error) {
	if args.Top, err = h.Nodes.Lookup(&a.Device, &a.Device); err != nil {
		return nil, err
	}
	if args.FilterNodeName, err = graph.GivenName(a.FilterNodeName); err != nil {
		return nil, fmt.Errorf("Could not create node: %w", err)
	}
	if err := h.streamEnd(args, a); err != nil {
		return nil, err
	}
	end := args.Base
	if args.Bottom != nil {
		end = chain.Below(args.Bottom)
	}
	for n := args.Top; n != nil && n != end; n = chain.Below(n) {
		if err := n.Blocked(graph.OpStream); err != nil {
			return nil, err
		}
		nodes = append(nodes, n)
	}
	if args.Base == nil && a.BackingFile != nil {
		return nil, fmt.Errorf("backing file specified, but streaming the entire chain")
	}
	if args.Base != nil {
		if _, _, err := h.headerName(args.Base); err != nil {
			return nil, err
		}
	}
	return nodes, nil
}

// streamEnd finds the node that the arguments name as the end of what is streamed.
func (h BlockJob) streamEnd(args *stream.Args, a *types.BlockStreamArgs) error {
	top := args.Top
	switch {
	case a.Base != nil:
		if args.Base = h.Nodes.FindBacking(top, *a.Base); args.Base == nil {
			return fmt.Errorf("Can't find '%s' in the backing chain", *a.Base)
		}
	case a.BaseNode != nil:
		n, err := h.Nodes.Lookup(nil, a.BaseNode)
		if err != nil {
			return err
		}
		if n == top || !chain.Contains(top, n) {
			return fmt.Errorf("Node '%s' is not a backing image of '%s'", *a.BaseNode, a.Device)
		}
		args.Base = n
	case a.Bottom != nil:
		n, err := h.Nodes.Lookup(nil, a.Bottom)
		if err != nil {
			return err
		}
		if n.Kind() == graph.Filter {
			return fmt.Errorf("Node '%s' is a filter, use a non-filter node as 'bottom'", *a.Bottom)
		}
		if !chain.Contains(top, n) {
			return fmt.Errorf("Node '%s' is not in a chain starting from '%s'", *a.Bottom, a.Device)
		}
		args.Bottom = n
	}
	return nil
}

func exclusive(nameA string, a *string, nameB string, b *string) error {
	if a != nil && b != nil {
		return fmt.Errorf("'%s' and '%s' cannot be specified at the same time", nameA, nameB)
	}
	return nil
}

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

func isFalse(p *bool) bool { return p != nil && !*p }
