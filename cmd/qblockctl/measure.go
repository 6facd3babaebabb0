package main

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// measureInfo is the schema's BlockMeasureInfo.
type measureInfo struct {
	Required       int64  `json:"required"`
	FullyAllocated int64  `json:"fully-allocated"`
	Bitmaps        *int64 `json:"bitmaps,omitempty"`
}

// measureOptions are those of the command.
type measureOptions struct{ size, target, options, format, output, node, password, snapshot string }

func (a *app) measureCommand() *cobra.Command {
	var o measureOptions
	cmd := &cobra.Command{
		Use:                   "measure [-O FORMAT] [-o OPTIONS] [--output json] {--size N | [-l SNAPSHOT] FILE | --node NAME}",
		DisableFlagsInUseLine: true,
		Short:                 "tell how large the file of an image would be",
		Long: "Tells how many bytes the file of a new image takes, as 'qemu-img measure' does: an empty one of --size bytes, or one with\n" +
			"the contents of an image file or, with --node, of a node of the running daemon. -o has options as qemu-img takes them\n" +
			"(cluster_size=64k,extended_l2=on); those that make no difference are ignored.",
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			sources := len(args)
			for _, s := range []string{o.size, o.node} {
				if s != "" {
					sources++
				}
			}
			switch {
			case sources != 1:
				return fmt.Errorf("measure: either --size, a FILE, or --node; %w", errUsage)
			case o.snapshot+o.password != "" && len(args) == 0:
				return fmt.Errorf("measure: -l and --password-file are for a FILE; %w", errUsage)
			}
			if o.output != "human" && o.output != "json" {
				return fmt.Errorf("measure: --output human or json; %w", errUsage)
			}
			return a.measure(cmd.Context(), o, strings.Join(args, ""))
		},
	}
	cmd.Flags().StringVarP(&o.target, "target", "O", "raw", "`FORMAT` of the new image")
	cmd.Flags().StringVarP(&o.options, "options", "o", "", "its `OPTIONS`: NAME=VALUE,...")
	cmd.Flags().StringVar(&o.size, "size", "", "size `N` of its disk in bytes, or with a suffix: k, M, G, T, P, E")
	cmd.Flags().StringVarP(&o.format, "format", "f", "", "`FORMAT` of FILE, if it is not to be guessed")
	cmd.Flags().StringVarP(&o.snapshot, "snapshot", "l", "", "the contents are what this `SNAPSHOT` inside FILE has, an ID or a name")
	cmd.Flags().StringVar(&o.output, "output", "human", "`FORM` of the result: human, or json")
	cmd.Flags().StringVar(&o.password, "password-file", "", passwordUsage)
	cmd.Flags().StringVar(&o.node, "node", "", "the contents are those of this `NODE` of the running daemon")
	return cmd
}

// measure asks a daemon and prints what it says.
func (a *app) measure(ctx context.Context, o measureOptions, file string) error {
	args, err := measureArguments(o.target, o.options)
	if err == nil && o.size != "" {
		args["size"], err = parseSize(o.size)
	}
	if err != nil {
		return fmt.Errorf("measure: %w; %w", err, errUsage)
	}
	var c *client
	switch {
	case o.node != "":
		args["node-name"] = o.node
		if c, err = dial(ctx, a.socket, nil); err != nil {
			return err
		}
		defer c.close()
	default:
		d, err := startOwn(ctx)
		if err != nil {
			return err
		}
		defer d.end()
		c = d.client
		if file != "" {
			args["node-name"] = imageNode
			spec := imageSpec{
				file: file, format: o.format, password: o.password, snapshot: o.snapshot, readOnly: true, chain: true,
			}
			if err := d.open(ctx, spec); err != nil {
				return err
			}
		}
	}
	text, err := c.execute(ctx, "x-qblockd-measure", args)
	if err != nil {
		return err
	}
	if o.output == "json" {
		return printJSON(a.out, text)
	}
	var m measureInfo
	if err := json.Unmarshal(text, &m); err != nil {
		return err
	}
	fmt.Fprintf(a.out, "required size: %d\nfully allocated size: %d\n", m.Required, m.FullyAllocated)
	if m.Bitmaps != nil {
		fmt.Fprintf(a.out, "bitmaps size: %d\n", *m.Bitmaps)
	}
	return nil
}

// makesNoDifference are options of new images that change nothing of their size.
var makesNoDifference = map[string]bool{
	"backing_fmt": true, "data_file": true, "data_file_raw": true, "lazy_refcounts": true, "compression_type": true,
	"key-secret": true, "ivgen-alg": true, "ivgen-hash-alg": true, "hash-alg": true, "iter-time": true, "nocow": true,
	"encrypt.key-secret": true, "encrypt.ivgen-alg": true, "encrypt.ivgen-hash-alg": true, "encrypt.hash-alg": true,
	"encrypt.iter-time": true, "extent_size_hint": true,
}

// measureArguments are those of x-qblockd-measure for a new image with options as qemu-img takes
// them.
func measureArguments(driver, options string) (map[string]any, error) {
	args := map[string]any{"driver": driver}
	for _, w := range strings.FieldsFunc(options, func(c rune) bool { return c == ',' }) {
		name, text, ok := strings.Cut(w, "=")
		if !ok {
			text = "on"
		}
		if makesNoDifference[name] || driver != "qcow2" && name == "preallocation" {
			continue
		}
		key, value, err := strings.ReplaceAll(name, "_", "-"), any(text), error(nil)
		switch name {
		case "cluster_size":
			value, err = parseSize(text)
		case "refcount_bits":
			value, err = strconv.Atoi(text)
		case "extended_l2":
			value = text == "on"
			if text != "on" && text != "off" {
				err = fmt.Errorf("'%s' is neither on nor off", text)
			}
		case "compat":
			key, value = "version", map[string]string{"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}[text]
		case "backing_file":
			value = true
		case "preallocation", "cipher-alg", "cipher-mode":
		case "encrypt.format", "encrypt.cipher-alg", "encrypt.cipher-mode":
			sub, _ := args["encrypt"].(map[string]any)
			if sub == nil {
				sub = map[string]any{}
			}
			switch {
			case name != "encrypt.format":
				sub[strings.TrimPrefix(name, "encrypt.")] = text
			case text == "aes":
				continue // it has no header
			}
			key, value = "encrypt", sub
		default:
			err = fmt.Errorf("Invalid parameter '%s'", name)
		}
		if err != nil {
			return nil, err
		}
		args[key] = value
	}
	return args, nil
}

// parseSize reads a number of bytes, which may have a suffix.
func parseSize(s string) (int64, error) {
	shift := 0
	if k := strings.IndexAny("bkmgtpe", strings.ToLower(s[max(0, len(s)-1):])); k >= 0 && s != "" {
		shift, s = 10*k, s[:len(s)-1]
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n<<shift>>shift != n {
		return 0, fmt.Errorf("'%s' is no size", s)
	}
	return n << shift, nil
}
