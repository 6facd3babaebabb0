package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
)

// imageCheck is the schema's ImageCheck, its members in QEMU's order.
type imageCheck struct {
	Filename         string   `json:"filename"`
	Format           string   `json:"format"`
	CheckErrors      int64    `json:"check-errors"`
	ImageEndOffset   int64    `json:"image-end-offset,omitempty"`
	Corruptions      int64    `json:"corruptions,omitempty"`
	Leaks            int64    `json:"leaks,omitempty"`
	CorruptionsFixed int64    `json:"corruptions-fixed,omitempty"`
	LeaksFixed       int64    `json:"leaks-fixed,omitempty"`
	Total            int64    `json:"total-clusters,omitempty"`
	Allocated        int64    `json:"allocated-clusters,omitempty"`
	Fragmented       int64    `json:"fragmented-clusters,omitempty"`
	Compressed       int64    `json:"compressed-clusters,omitempty"`
	Faults           []string `json:"x-qblockd-faults,omitempty"`
}

// Exit statuses of a check, those of qemu-img.
const (
	exitErrors       = 1 // it could not be made
	exitCorrupt      = 2
	exitLeaks        = 3
	exitNotSupported = 63
)

// noChecks is what the daemon says of formats that have none.
const noChecks = "This image format does not support checks"

// checkOptions are those of the command.
type checkOptions struct{ repair, format, output, node, password string }

func (a *app) checkCommand() *cobra.Command {
	var o checkOptions
	cmd := &cobra.Command{
		Use:                   "check [-r leaks|all] [--output json] {FILE | --node NAME}",
		DisableFlagsInUseLine: true,
		Short:                 "look an image over for faults, or repair it",
		Long: "Looks an image over for faults, as 'qemu-img check' does: a file that nobody writes to, by a daemon started for that alone;\n" +
			"or, with --node, the image of a node of the running daemon, where requests to it wait meanwhile. With -r it is repaired: leaks\n" +
			"gives back clusters that nothing uses; all repairs whatever can be, also what an image marked as corrupt has.\n\n" +
			"The exit status is 0 if nothing is wrong (any more), 1 if the check could not be made, 2 if the image is corrupt, 3 if it has\n" +
			"leaks and nothing worse, 63 if its format has no checks.",
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch {
			case (len(args) == 1) == (o.node != ""), o.node != "" && o.password != "":
				return usage("check", "a FILE, or --node")
			case o.repair != "none" && o.repair != "leaks" && o.repair != "all":
				return usage("check", "-r leaks or -r all")
			case o.output != "human" && o.output != "json":
				return usage("check", "--output human or json")
			}
			return a.check(cmd.Context(), o, strings.Join(args, ""))
		},
	}
	cmd.Flags().StringVarP(&o.repair, "repair", "r", "none", "`WHAT` to repair: leaks, or all")
	cmd.Flags().StringVarP(&o.format, "format", "f", "", "`FORMAT` of the image, if it is not to be guessed")
	cmd.Flags().StringVar(&o.output, "output", "human", "`FORM` of the result: human, or json")
	cmd.Flags().StringVar(&o.password, "password-file", "", passwordUsage)
	cmd.Flags().StringVar(&o.node, "node", "", "check the image of this `NODE` of the running daemon")
	return cmd
}

// check makes a check and prints what came of it.
func (a *app) check(ctx context.Context, o checkOptions, file string) error {
	var found *imageCheck
	var err error
	if o.node != "" {
		found, err = a.checkNode(ctx, o)
	} else {
		found, err = checkFile(ctx, o, file)
	}
	var refused *replyError
	switch {
	case errors.As(err, &refused) && refused.Desc == noChecks:
		return &statusError{exitNotSupported, err}
	case err != nil:
		return &statusError{exitErrors, err}
	}
	if o.output == "json" {
		text, err := json.Marshal(found)
		if err == nil {
			err = printJSON(a.out, text)
		}
		if err != nil {
			return err
		}
	} else {
		found.print(a.out)
	}
	return found.status()
}

func (a *app) checkNode(ctx context.Context, o checkOptions) (*imageCheck, error) {
	events := newEventQueue()
	c, err := dial(ctx, a.socket, events.put)
	if err != nil {
		return nil, err
	}
	defer c.close()
	return runCheck(ctx, c, events, fmt.Sprintf("qblockctl-check-%d", os.Getpid()), o.node, o.repair)
}

// checkFile checks an image file. It is opened read-only, as nothing that is wrong may keep it from
// being opened.
func checkFile(ctx context.Context, o checkOptions, file string) (*imageCheck, error) {
	format, err := o.format, error(nil)
	if format == "" {
		if format, err = imageFormat(file); err != nil {
			return nil, err
		}
	}
	path, err := filepath.Abs(file)
	if err != nil {
		return nil, err
	}
	d, err := startOwn(ctx)
	if err != nil {
		return nil, err
	}
	defer d.end()
	node := map[string]any{
		"driver": format, "node-name": "image", "read-only": true,
		"file": map[string]any{"driver": "file", "filename": path, "read-only": o.repair == "none"},
	}
	if format == "qcow2" {
		node["backing"], node["x-qblockd-for-check"] = nil, true
	}
	if err := d.unlock(ctx, node, o.password); err != nil {
		return nil, err
	}
	if _, err := d.execute(ctx, "blockdev-add", node); err != nil {
		return nil, fmt.Errorf("Could not open '%s': %w", file, err)
	}
	found, err := runCheck(ctx, d.client, d.events, "check", "image", o.repair)
	if found != nil {
		found.Filename = file
	}
	return found, err
}

// runCheck has the daemon check the image of a node.
func runCheck(ctx context.Context, c *client, events *eventQueue, id, node, repair string) (*imageCheck, error) {
	j, err := runJob(ctx, c, events, "x-qblockd-check", id, map[string]any{"node-name": node, "repair": repair})
	switch {
	case err != nil:
		return nil, err
	case j.Error != "":
		return nil, errors.New(printable(j.Error))
	case j.Check == nil:
		return nil, errors.New("the job has told nothing")
	}
	return j.Check, nil
}

// status is the exit status that the result stands for.
func (f *imageCheck) status() error {
	switch {
	case f.Corruptions > 0:
		return &statusError{code: exitCorrupt}
	case f.Leaks > 0:
		return &statusError{code: exitLeaks}
	case f.CheckErrors > 0:
		return &statusError{code: exitErrors}
	}
	return nil
}

// print tells the result to people.
func (f *imageCheck) print(out io.Writer) {
	for _, s := range f.Faults {
		fmt.Fprintln(out, "fault:", printable(s))
	}
	if f.CorruptionsFixed+f.LeaksFixed > 0 {
		fmt.Fprintf(out, "repaired: %d corruptions, %d leaked clusters\n", f.CorruptionsFixed, f.LeaksFixed)
	}
	if f.Corruptions+f.Leaks+f.CheckErrors == 0 {
		fmt.Fprintln(out, "the image is sound")
	}
	if f.Corruptions > 0 {
		fmt.Fprintf(out, "corruptions: %d (data may be damaged, or be damaged by writes)\n", f.Corruptions)
	}
	if f.Leaks > 0 {
		fmt.Fprintf(out, "leaked clusters: %d (space is wasted, data are not touched)\n", f.Leaks)
	}
	if f.CheckErrors > 0 {
		fmt.Fprintf(out, "could not be looked at, or not be repaired: %d places\n", f.CheckErrors)
	}
	if f.Total > 0 {
		part := func(n, of int64) float64 { return 100 * float64(n) / float64(max(of, 1)) }
		fmt.Fprintf(out, "%d of %d clusters (%.2f%%) are allocated; of those %.2f%% are fragmented, %.2f%% compressed\n",
			f.Allocated, f.Total, part(f.Allocated, f.Total), part(f.Fragmented, f.Allocated), part(f.Compressed, f.Allocated))
	}
	if f.ImageEndOffset > 0 {
		fmt.Fprintf(out, "the last cluster in use ends at %d\n", f.ImageEndOffset)
	}
}
