package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
)

// snapshotInfo is the schema's SnapshotInfo.
type snapshotInfo struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	VMStateSize int64  `json:"vm-state-size"`
	DateSec     int64  `json:"date-sec"`
	VMClockSec  int64  `json:"vm-clock-sec"`
	VMClockNsec int64  `json:"vm-clock-nsec"`
}

// snapshotOptions are those of the command.
type snapshotOptions struct {
	list                            bool
	create, apply, drop, node, form string
	password                        string
}

func (a *app) snapshotCommand() *cobra.Command {
	var o snapshotOptions
	cmd := &cobra.Command{
		Use:                   "snapshot [-l | -c NAME | -a SNAPSHOT | -d SNAPSHOT] {FILE | --node NAME}",
		DisableFlagsInUseLine: true,
		Short:                 "list, make, apply or delete snapshots inside an image",
		Long: "Lists the snapshots inside an image, makes one, goes back to one (which stays; what the disk holds is gone unless other\n" +
			"snapshots have it), or deletes one, as 'qemu-img snapshot' does: of a file that nobody else uses, by a daemon started for\n" +
			"that alone, or, with --node, of a node of the running daemon. SNAPSHOT is an ID or, if no snapshot has that, a name.",
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			given := 0
			for _, s := range []string{o.create, o.apply, o.drop} {
				if s != "" {
					given++
				}
			}
			if given > 1 || given == 1 && o.list || (len(args) == 1) == (o.node != "") || o.node != "" && o.password != "" {
				return fmt.Errorf("snapshot: one of -l, -c, -a and -d, and a FILE or --node; %w", errUsage)
			}
			return a.snapshot(cmd.Context(), o, strings.Join(args, ""))
		},
	}
	cmd.Flags().BoolVarP(&o.list, "list", "l", false, "list them, which is what is done if nothing else is asked for")
	cmd.Flags().StringVarP(&o.create, "create", "c", "", "make one of this `NAME`")
	cmd.Flags().StringVarP(&o.apply, "apply", "a", "", "go back to this `SNAPSHOT`")
	cmd.Flags().StringVarP(&o.drop, "delete", "d", "", "delete this `SNAPSHOT`")
	cmd.Flags().StringVarP(&o.form, "format", "f", "", "`FORMAT` of FILE, if it is not to be guessed")
	cmd.Flags().StringVar(&o.password, "password-file", "", passwordUsage)
	cmd.Flags().StringVar(&o.node, "node", "", "snapshots of this `NODE` of the running daemon")
	return cmd
}

// snapshot does what was asked for on a daemon.
func (a *app) snapshot(ctx context.Context, o snapshotOptions, file string) error {
	node := o.node
	var c *client
	if node == "" {
		d, err := startOwn(ctx)
		if err != nil {
			return err
		}
		defer d.end()
		c, node = d.client, imageNode
		spec := imageSpec{file: file, format: o.form, password: o.password, readOnly: o.create+o.apply+o.drop == ""}
		if err := d.open(ctx, spec); err != nil {
			return err
		}
	} else {
		var err error
		if c, err = dial(ctx, a.socket, nil); err != nil {
			return err
		}
		defer c.close()
	}
	if o.create != "" {
		_, err := c.execute(ctx, "blockdev-snapshot-internal-sync", map[string]any{"device": node, "name": o.create})
		return err
	}
	info, err := imageOf(ctx, c, node)
	if err != nil {
		return err
	}
	l := info.Snapshots
	which, command := o.apply, "x-qblockd-snapshot-apply"
	if o.drop != "" {
		which, command = o.drop, "blockdev-snapshot-delete-internal-sync"
	}
	if which == "" {
		return printSnapshots(a.out, l)
	}
	i := slices.IndexFunc(l, func(s snapshotInfo) bool { return s.ID == which })
	if i < 0 {
		i = slices.IndexFunc(l, func(s snapshotInfo) bool { return s.Name == which })
	}
	if i < 0 {
		return fmt.Errorf("there is no snapshot '%s'", which)
	}
	_, err = c.execute(ctx, command, map[string]any{"device": node, "id": l[i].ID, "name": l[i].Name})
	return err
}

// printSnapshots prints a table of snapshots; nothing, if there are none.
func printSnapshots(out io.Writer, l []snapshotInfo) error {
	if len(l) == 0 {
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tNAME\tVM STATE\tDATE\tVM CLOCK")
	for _, s := range l {
		clock := time.Duration(s.VMClockSec)*time.Second + time.Duration(s.VMClockNsec)
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%s\n", printable(s.ID), printable(s.Name), s.VMStateSize,
			time.Unix(s.DateSec, 0).Format(time.DateTime), clock.Round(time.Millisecond))
	}
	return w.Flush()
}
