// Command qblockd is a storage daemon: QEMU's block layer as a service of its own, spoken to over
// QMP. It takes the options of qemu-storage-daemon; see --help.
//
// This package wires the others together and reads as the map of the program:
//
//	main.go       two passes over the options, as in qemu-storage-daemon: the process, then the rest
//	options.go    the options: how they are written, what is said of them, what they do
//	daemon.go     the parts, how they hang together, and how they end
//	quickstart.go --quickstart: a disk, a monitor and an NBD server out of nothing
//	limits.go     --limit: what clients can make the daemon hold
//	policy.go     --image-policy: what images may name
//	memory.go     how much garbage there may be, and when memory is given back
//	help.go       --help, --version
//	cmdline/      the dialects of the command line
package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"qblockd/blockdev"
	"qblockd/cmd/qblockd/cmdline"
	"qblockd/events/panics"
)

func main() {
	setupLog(slog.LevelInfo)
	if !panics.Loud {
		panics.Contain()
	}
	tuneMemory()
	items, scanErr := cmdline.Scan(os.Args[1:], scanned())
	early := processOptions(items, scanErr)
	ready := func() {}
	if early.daemonize {
		f, err := daemonize()
		if err != nil {
			fatal("", fmt.Errorf("cannot daemonize: %w", err))
		}
		ready = f
	}
	d := newDaemon(early)
	starting, signals := d.catchSignals()
	for _, it := range items {
		if err := d.apply(starting, it); err != nil {
			if errors.Is(err, errHelpShown) {
				os.Exit(0)
			}
			if starting.Err() != nil {
				d.waitForEnd(signals) // what was waited for (a client, storage) is not to come any more
			}
			d.abandon()
			fatal(it.Where(), err)
		}
	}
	if early.pidfile != "" {
		p, err := writePidFile(early.pidfile)
		if err != nil {
			d.abandon()
			fatal("", err)
		}
		d.pidfile = p
	}
	ready()
	close(d.up)
	d.waitForEnd(signals)
}

// processWide is what the first pass finds.
type processWide struct {
	daemonize  bool
	pidfile    string
	socketMode fs.FileMode
	limits     limits
	policy     blockdev.Policy
}

// processOptions does the options that concern the process and come before all others wherever they
// stand. A scanning error counts where the scan met it: --help before it wins.
func processOptions(items []cmdline.Item, scanErr error) (p processWide) {
	p.socketMode, p.limits = 0o600, defaultLimits()
	for _, it := range items {
		if o := optionOf(it); o.process != nil {
			if err := o.process(&p, it.Arg); errors.Is(err, errHelpShown) {
				os.Exit(0)
			} else if err != nil {
				fatal(it.Where(), err)
			}
		}
	}
	if scanErr != nil {
		fmt.Fprintf(os.Stderr, "%s: %s\n", os.Args[0], scanErr)
		os.Exit(1)
	}
	return p
}

// parseSettings reads an argument NAME=VALUE,... of an option whose settings are for the process.
// If it asks for help it prints that: errHelpShown.
func parseSettings(arg string, known map[string]cmdline.OptType, help func() string) (*cmdline.Opts, error) {
	o, err := cmdline.ParseOpts(arg, "", known)
	switch {
	case err != nil:
		return nil, err
	case o.ID != "":
		return nil, errors.New("Invalid parameter 'id'")
	case o.Help:
		fmt.Print(help())
		return nil, errHelpShown
	}
	return o, nil
}

func programName() string { return filepath.Base(os.Args[0]) }

// report writes a message in the form of QEMU: program, the option it is about, text.
func report(where, text string) {
	if where != "" {
		where += ": "
	}
	if isTerminal(os.Stderr) {
		where, text = printable(where), printable(text)
	}
	fmt.Fprintf(os.Stderr, "%s: %s%s\n", programName(), where, text)
}

// fatal reports an error, with its hint if it has one, and exits.
func fatal(where string, err error) {
	report(where, err.Error())
	var h interface{ Hint() string }
	if errors.As(err, &h) && h.Hint() != "" {
		fmt.Fprintln(os.Stderr, strings.TrimSuffix(h.Hint(), "\n"))
	}
	os.Exit(1)
}
