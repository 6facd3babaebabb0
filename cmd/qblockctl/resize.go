package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"
)

// resizeOptions are those of the command.
type resizeOptions struct {
	format, password, node, mode string
	shrink                       bool
}

func (a *app) resizeCommand() *cobra.Command {
	var o resizeOptions
	cmd := &cobra.Command{
		Use:                   "resize [--shrink] [--preallocation MODE] {FILE | --node NAME} [+|-]SIZE",
		DisableFlagsInUseLine: true,
		Short:                 "make the disk of an image larger or smaller",
		Long: "Changes the size of a disk to SIZE bytes, or by so many, as 'qemu-img resize' does: of a file that nobody else uses, by a\n" +
			"daemon started for that alone, or, with --node, of a node of the running daemon. SIZE may have a suffix: k, M, G, T, P, E.\n" +
			"What is added reads as zeroes. A disk becomes smaller, and loses what lies behind its end, with --shrink only. A SIZE that\n" +
			"begins with - goes behind --.",
		Args: usageArgs(cobra.RangeArgs(1, 2)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 2) == (o.node != "") || o.node != "" && o.password != "" {
				return usage("resize", "a FILE, or --node, and a SIZE")
			}
			if !slices.Contains([]string{"off", "metadata", "falloc", "full"}, o.mode) {
				return usage("resize", "--preallocation off, metadata, falloc or full")
			}
			size, sign := args[len(args)-1], byte(0)
			if size != "" && (size[0] == '+' || size[0] == '-') {
				size, sign = size[1:], size[0]
			}
			n, err := parseSize(size)
			if err != nil {
				return usage("resize", "%v", err)
			}
			return a.resize(cmd.Context(), o, args[0], n, sign)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		// qemu-img takes the last word as the size in any case.
		return usage("resize", "%v (a SIZE that begins with - goes behind --)", err)
	})
	cmd.Flags().StringVarP(&o.format, "format", "f", "", "`FORMAT` of FILE, if it is not to be guessed")
	cmd.Flags().StringVar(&o.mode, "preallocation", "off", "how space for what is added is provided: `MODE` is off, metadata, falloc or full")
	cmd.Flags().BoolVar(&o.shrink, "shrink", false, "the disk may become smaller")
	cmd.Flags().StringVar(&o.password, "password-file", "", passwordUsage)
	cmd.Flags().StringVar(&o.node, "node", "", "resize this `NODE` of the running daemon")
	return cmd
}

// resize changes the size to n or, with a sign, by n.
func (a *app) resize(ctx context.Context, o resizeOptions, file string, n int64, sign byte) error {
	node := o.node
	var c *client
	if node == "" {
		d, err := startOwn(ctx)
		if err != nil {
			return err
		}
		defer d.end()
		c, node = d.client, imageNode
		if err := d.open(ctx, imageSpec{file: file, format: o.format, password: o.password, chain: true}); err != nil {
			return err
		}
	} else {
		var err error
		if c, err = dial(ctx, a.socket, nil); err != nil {
			return err
		}
		defer c.close()
	}
	info, err := imageOf(ctx, c, node)
	if err != nil {
		return err
	}
	old := info.Size
	switch sign {
	case '+':
		n += old
	case '-':
		n = old - n
	}
	switch {
	case n < 0 || sign == '-' && n == 0:
		return errors.New("the new size has to be larger than zero")
	case n < old && !o.shrink:
		return fmt.Errorf("the disk has %d bytes; --shrink makes it smaller, and what lies behind is lost", old)
	}
	args := map[string]any{"node-name": node, "size": n}
	if o.mode != "off" {
		args["x-qblockd-preallocation"] = o.mode
	}
	_, err = c.execute(ctx, "block_resize", args)
	return err
}

// imageInfo is what is used of the schema's ImageInfo.
type imageInfo struct {
	Size      int64          `json:"virtual-size"`
	Snapshots []snapshotInfo `json:"snapshots"`
}

// imageOf shows the image of a node.
func imageOf(ctx context.Context, c *client, node string) (*imageInfo, error) {
	type shown struct {
		Name  string    `json:"node-name"`
		Image imageInfo `json:"image"`
	}
	nodes, err := query[[]shown](ctx, c, "query-named-block-nodes", map[string]any{"flat": true})
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(nodes, func(n shown) bool { return n.Name == node })
	if i < 0 {
		return nil, errors.New("there is no node '" + node + "'")
	}
	return &nodes[i].Image, nil
}
