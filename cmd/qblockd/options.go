package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"qblockd/cmd/qblockd/cmdline"
	"qblockd/events/trace"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// errHelpShown: the option asked for help only, and got it.
var errHelpShown = errors.New("help was shown")

// apply does one option of the second pass.
func (d *daemon) apply(ctx context.Context, it cmdline.Item) error {
	if it.Option == nil {
		return errors.New("Unexpected argument")
	}
	switch it.Option.Long {
	case "blockdev":
		return withArgument(it.Arg, "driver", types.DecodeBlockdevOptions, func(o *types.BlockdevOptions) error {
			return d.nodes.Add(ctx, o)
		})
	case "export":
		return withArgument(it.Arg, "type", types.DecodeBlockExportOptions, func(o *types.BlockExportOptions) error {
			return d.exports.Add(ctx, o)
		})
	case "nbd-server":
		return withArgument(it.Arg, "", types.DecodeNbdServerOptions, func(o *types.NbdServerOptions) error {
			return d.nbd.Start(ctx, &o.Addr, o.MaxConnections)
		})
	case "monitor":
		return withArgument(it.Arg, "chardev", types.DecodeMonitorOptions, d.addMonitor)
	case "chardev":
		return d.addChardev(ctx, it)
	case "object":
		return d.addObject(it.Arg)
	case "trace":
		return enableTrace(it)
	case "quickstart":
		return d.quickstart(ctx, it.Arg)
	}
	return nil // done in the first pass
}

// withArgument parses an option's argument, JSON or key=value, decodes it by the schema and does f.
func withArgument[T any](arg, implied string, decode func(value.Value, types.Mode) (*T, error), f func(*T) error) error {
	v, fromText, err := cmdline.Structured(arg, implied)
	if err != nil {
		return err
	}
	mode := types.ModeQObject
	if fromText {
		mode = types.ModeKeyval
	}
	o, err := decode(v, mode)
	if err != nil {
		return err
	}
	return f(o)
}

// enableTrace switches trace points on. A name that matches nothing is only warned about.
func enableTrace(it cmdline.Item) error {
	o, err := cmdline.ParseOpts(it.Arg, "enable", map[string]cmdline.OptType{"enable": cmdline.OptString})
	if err != nil {
		return err
	}
	pattern, _ := o.Get("enable")
	if o.Help || pattern == "help" || pattern == "?" {
		for _, p := range trace.Points() {
			fmt.Println(p.Name())
		}
		return errHelpShown
	}
	if trace.Enable(pattern) == 0 && !strings.ContainsAny(pattern, "*?[") {
		report(it.Where(), fmt.Sprintf("warning: trace event '%s' does not exist", pattern))
	}
	slog.Debug("trace", "pattern", pattern)
	return nil
}

// addObject does --object, or shows help for it.
func (d *daemon) addObject(arg string) error {
	if arg == "help" || arg == "?" {
		fmt.Println("List of user creatable objects:")
		for _, t := range types.ObjectTypeValues {
			fmt.Println("  " + string(t))
		}
		return errHelpShown
	}
	if !strings.HasPrefix(arg, "{") {
		v, help, err := cmdline.Keyval(arg, "qom-type")
		if err != nil {
			return err
		}
		if help {
			return d.objectHelp(v)
		}
	}
	return withArgument(arg, "qom-type", types.DecodeObjectOptions, d.objects.Add)
}

func (d *daemon) objectHelp(v *value.Dict) error {
	typ, _ := v.Get("qom-type")
	name, _ := typ.(string)
	props, err := d.objects.TypeProperties(name)
	if err != nil {
		return fmt.Errorf("Parameter 'qom-type' does not accept value '%s'", name)
	}
	fmt.Printf("%s options:\n", name)
	for _, p := range props {
		if p.Name != "type" {
			fmt.Printf("  %s=<%s>\n", p.Name, p.Type)
		}
	}
	return errHelpShown
}
