package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

func (a *app) eventsCommand() *cobra.Command {
	var asJSON bool
	var count int
	cmd := &cobra.Command{
		Use:                   "events [--json] [--count N] [NAME...]",
		DisableFlagsInUseLine: true,
		Short:                 "print events as they come, all or those named",
		Long: "Prints each event as it comes: when, its name, its data. It ends when the daemon does, by Ctrl-C, or after --count of them:\n" +
			"'qblockctl events -n 1 BLOCK_JOB_COMPLETED' waits for the end of a job. 'qblockctl jobs --watch' is another way.",
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
			c, stop := a.completer(cmd.Context())
			defer stop()
			return begins(c.schema.Events(), word), cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if count < 0 {
				return usage("events", "--count is %d", count)
			}
			return a.events(cmd.Context(), asJSON, count, args)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print each event as the daemon sends it, a line each")
	cmd.Flags().IntVarP(&count, "count", "n", 0, "end after `N` events; 0: never")
	return cmd
}

// checkEvents refuses names of events that the daemon does not have: they would never come.
func checkEvents(names, there []string) error {
	for _, n := range names {
		if !slices.Contains(there, n) {
			return fmt.Errorf("the daemon has no event '%s'; it has\n%s", n,
				strings.TrimSuffix(wrap(strings.Join(there, " "), "  ", 100), "\n"))
		}
	}
	return nil
}

// events prints events until the daemon ends the connection, ctx ends, or count of them were
// printed.
func (a *app) events(ctx context.Context, asJSON bool, count int, only []string) error {
	q := newEventQueue()
	c, err := dial(ctx, a.socket, q.put)
	if err != nil {
		return err
	}
	defer c.close()
	if len(only) > 0 {
		if err := checkEvents(only, liveSchema(ctx, c).Events()); err != nil {
			return err
		}
	}
	printed := 0
	show := func() error {
		for _, m := range q.take() {
			if len(only) > 0 && !slices.Contains(only, m.Event) || count > 0 && printed == count {
				continue
			}
			line := a.style.event(m)
			if asJSON {
				line = string(m.raw)
			}
			if _, err := fmt.Fprintln(a.out, line); err != nil {
				return err
			}
			printed++
		}
		return nil
	}
	for {
		select {
		case <-q.wake:
			if err := show(); err != nil || count > 0 && printed == count {
				return err
			}
		case <-ctx.Done():
			return nil
		case <-c.ended:
			switch err := show(); {
			case err != nil:
				return err
			case !errors.Is(c.err, errClosed):
				return c.err
			case count > 0 && printed < count:
				return fmt.Errorf("%w after %d of %d events", c.err, printed, count)
			}
			return nil
		}
	}
}
