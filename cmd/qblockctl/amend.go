package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) amendCommand() *cobra.Command {
	var options, node, password string
	cmd := &cobra.Command{
		Use:                   "amend -o OPTION=VALUE[,...] {FILE | --node NAME}",
		DisableFlagsInUseLine: true,
		Short:                 "change options of a qcow2 image",
		Long: "Changes options of a qcow2 image where it is, as 'qemu-img amend' does: of a file that nobody has open, by a daemon started\n" +
			"for that alone; or, with --node, of a node of the running daemon, where requests to it wait meanwhile. OPTION is compat (0.10,\n" +
			"1.1, v2, v3), refcount_bits, lazy_refcounts, data_file, data_file_raw, backing_file or backing_fmt. If it is killed in between\n" +
			"the image has the old value or the new one.",
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 1) == (node != "") || node != "" && password != "" {
				return usage("amend", "a FILE, or --node")
			}
			if options == "" {
				return usage("amend", "-o tells what to change")
			}
			members, err := amendOptions(options)
			if err != nil {
				return usage("amend", "%v", err)
			}
			if node != "" {
				return a.amendNode(cmd.Context(), node, members)
			}
			return amendFile(cmd.Context(), args[0], password, members)
		},
	}
	cmd.Flags().StringVarP(&options, "options", "o", "", "`OPTIONS` to change, with commas between them")
	cmd.Flags().StringVar(&password, "password-file", "", passwordUsage)
	cmd.Flags().StringVar(&node, "node", "", "change the image of this `NODE` of the running daemon")
	return cmd
}

// amendOptions makes members of the schema's BlockdevAmendOptionsQcow2 of options as qemu-img has
// them. A comma in a value is written twice.
func amendOptions(text string) (map[string]any, error) {
	const comma = "\x00"
	members := map[string]any{"driver": "qcow2"}
	for _, word := range strings.Split(strings.ReplaceAll(text, ",,", comma), ",") {
		key, v, ok := strings.Cut(strings.ReplaceAll(word, comma, ","), "=")
		if !ok {
			return nil, fmt.Errorf("'%s' is not of the form OPTION=VALUE", word)
		}
		name := strings.ReplaceAll(key, "_", "-")
		switch name {
		case "compat":
			version, known := map[string]string{"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}[v]
			if !known {
				return nil, fmt.Errorf("Unknown compatibility level %s", v)
			}
			members["version"] = version
		case "refcount-bits":
			n, err := strconv.ParseInt(v, 0, 64)
			if err != nil {
				return nil, fmt.Errorf("'%s' is no number", v)
			}
			members[name] = n
		case "lazy-refcounts", "data-file-raw":
			on, known := map[string]bool{"on": true, "off": false}[v]
			if !known {
				return nil, fmt.Errorf("%s is on or off", key)
			}
			members[name] = on
		case "data-file", "backing-file", "backing-fmt":
			members[name] = v
		default:
			return nil, fmt.Errorf("'%s' cannot be changed", key)
		}
	}
	return members, nil
}

func (a *app) amendNode(ctx context.Context, node string, members map[string]any) error {
	events := newEventQueue()
	c, err := dial(ctx, a.socket, events.put)
	if err != nil {
		return err
	}
	defer c.close()
	return runAmend(ctx, c, events, fmt.Sprintf("qblockctl-amend-%d", os.Getpid()), node, members)
}

func amendFile(ctx context.Context, file, password string, members map[string]any) error {
	if format, err := imageFormat(file); err != nil || format != "qcow2" {
		if err == nil {
			err = fmt.Errorf("Format driver '%s' does not support option amendment", format)
		}
		return err
	}
	d, err := startOwn(ctx)
	if err != nil {
		return err
	}
	defer d.end()
	if err := d.open(ctx, imageSpec{file: file, format: "qcow2", password: password}); err != nil {
		return err
	}
	return runAmend(ctx, d.client, d.events, "amend", imageNode, members)
}

// runAmend has the daemon change the image of a node.
func runAmend(
	ctx context.Context, c *client, events *eventQueue, id, node string, members map[string]any,
) error {
	j, err := runJob(ctx, c, events, "x-blockdev-amend", id, map[string]any{"node-name": node, "options": members})
	if err == nil && j.Error != "" {
		err = errors.New(printable(j.Error))
	}
	return err
}
