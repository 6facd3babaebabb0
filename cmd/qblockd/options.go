package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strconv"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/cmd/qblockd/cmdline"
	"qblockd/events/trace"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// option is one of the command line. Exactly one of process and apply is set.
type option struct {
	long  string   // without dashes
	short byte     // 0: none
	args  []string // the forms of its argument; none if it takes none
	text  string   // explains it, in one paragraph
	// process is done before all others, wherever the option stands: it is about the whole process.
	process func(p *processWide, arg string) error
	// apply is done in turn.
	apply func(d *daemon, ctx context.Context, it cmdline.Item) error
}

// optionGroups are all options, in the groups and the order in which they are shown: scanning,
// --help, the manual page and the shells' completions go by them.
func optionGroups() [][]option {
	return [][]option{{
		{long: "help", short: 'h', process: showHelp,
			text: "show this text and exit"},
		{long: "version", short: 'V', process: showVersion,
			text: "show the version and exit"},
		{long: "trace", short: 'T', apply: enableTrace,
			args: []string{"[enable=]<pattern>"},
			text: "log the trace points that match; 'help' lists them"},
	}, {
		{long: "blockdev", apply: structured("driver", types.DecodeBlockdevOptions, (*daemon).addNode),
			args: []string{"[driver=]<driver>,node-name=<name>[,<option>=<value>...]"},
			text: "open a block node, as QMP blockdev-add does; nested options are dotted (file.driver=file), " +
				"or the whole may be JSON; 'qblockctl help blockdev-add driver=<driver>' explains the options"},
		{long: "chardev", apply: (*daemon).addChardev,
			args: []string{"<backend>,id=<id>[,<option>=<value>...]"},
			text: "make a character device, for instance socket,id=m,path=qmp.sock,server=on,wait=off; " +
				"'help' lists the backends"},
		{long: "monitor", apply: structured("chardev", types.DecodeMonitorOptions, (*daemon).addMonitor),
			args: []string{"[chardev=]<id>[,mode=control][,pretty=on|off][,read-only=on|off][,allow-uid.0=<uid>...]"},
			text: "speak QMP on a character device, to any number of clients at once; read-only takes only commands that " +
				"change nothing, allow-uid.0, .1, ... are the users whose processes may connect to a unix socket"},
		{long: "nbd-server", apply: structured("", types.DecodeNbdServerOptions, (*daemon).startNBD),
			args: []string{
				"addr.type=unix,addr.path=<path>[,max-connections=<n>]",
				"addr.type=inet,addr.host=<host>,addr.port=<port>[,tls-creds=<id>]"},
			text: "start the NBD server; tls-creds and tls-authz name objects that say what clients must prove, " +
				"handshake-max-seconds is how long they may take for it"},
		{long: "export", apply: structured("type", types.DecodeBlockExportOptions, (*daemon).addExport),
			args: []string{
				"[type=]nbd,id=<id>,node-name=<node>[,name=<name>][,writable=on|off]",
				"[type=]vhost-user-blk,id=<id>,node-name=<node>,addr.type=unix,addr.path=<path>[,writable=on|off]" +
					"[,num-queues=<n>][,logical-block-size=<n>]",
				"[type=]fuse,id=<id>,node-name=<node>,mountpoint=<file>[,writable=on|off][,growable=on|off]"},
			text: "export a node: over NBD, which needs --nbd-server before it, as a disk for a virtual machine, or as " +
				"a file, mounted over an existing one"},
		{long: "object", apply: (*daemon).addObject,
			args: []string{"<type>,id=<id>[,<property>=<value>...]"},
			text: "make an object; 'help' lists the types, '<type>,help' their properties"},
	}, {
		{long: "daemonize", process: func(p *processWide, _ string) error { p.daemonize = true; return nil },
			text: "go to the background once all options have taken effect, wherever it stands; " +
				"then the working folder is / and the log goes nowhere"},
		{long: "pidfile", process: func(p *processWide, path string) error { p.pidfile = path; return nil },
			args: []string{"<path>"},
			text: "write the process id to a file, locked while the daemon lives"},
		{long: "socket-mode", process: (*processWide).setSocketMode,
			args: []string{"<octal>"},
			text: "permissions of the socket files that the daemon makes, wherever the option stands (default 0600)"},
		{long: "limit", process: func(p *processWide, arg string) error { return p.limits.setLimits(arg) },
			args: []string{"<name>=<value>[,...]"},
			text: "bound what clients can make the daemon hold; 'help' lists the names and their defaults"},
		{long: "image-policy", process: func(p *processWide, arg string) error { return setPolicy(&p.policy, arg) },
			args: []string{"<name>=<value>[,...]"},
			text: "what the headers of images may name as backing files; 'help' lists the names and their defaults"},
		{long: "quickstart", apply: (*daemon).quickstart,
			args: []string{"<dir>"},
			text: "serve a new disk with a monitor and an NBD server, all below <dir>, and show what to try"},
	}}
}

// scanned is how the options look to the scanner, by name.
func scanned() (l []cmdline.Option) {
	for _, o := range slices.Concat(optionGroups()...) {
		l = append(l, cmdline.Option{Long: o.long, Short: o.short, Arg: len(o.args) > 0})
	}
	slices.SortFunc(l, func(a, b cmdline.Option) int { return strings.Compare(a.Long, b.Long) })
	return l
}

// optionOf finds what was scanned; the zero option for a word that is none.
func optionOf(it cmdline.Item) (found option) {
	for _, o := range slices.Concat(optionGroups()...) {
		if it.Option != nil && o.long == it.Option.Long {
			found = o
		}
	}
	return found
}

// errHelpShown: the option asked for help only, and got it.
var errHelpShown = errors.New("help was shown")

func showHelp(*processWide, string) error {
	fmt.Print(helpText(programName()))
	return errHelpShown
}

func showVersion(*processWide, string) error {
	fmt.Print(versionText(programName()))
	return errHelpShown
}

func (p *processWide) setSocketMode(arg string) error {
	mode, err := strconv.ParseUint(arg, 8, 32)
	if err != nil || mode > 0o777 {
		return fmt.Errorf("'%s' is not a file mode in octal", arg)
	}
	p.socketMode = fs.FileMode(mode)
	return nil
}

// apply does one option of the second pass.
func (d *daemon) apply(ctx context.Context, it cmdline.Item) error {
	o := optionOf(it)
	switch {
	case it.Option == nil:
		return errors.New("Unexpected argument")
	case o.apply == nil:
		return nil // done in the first pass
	}
	return o.apply(d, ctx, it)
}

// structured makes an apply of what is done with the argument, which the schema describes. implied
// is the key of a first word without one.
func structured[T any](implied string, decode func(value.Value, types.Mode) (*T, error),
	do func(*daemon, context.Context, *T) error) func(*daemon, context.Context, cmdline.Item) error {
	return func(d *daemon, ctx context.Context, it cmdline.Item) error {
		v, fromText, err := cmdline.Structured(it.Arg, implied)
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
		return do(d, ctx, o)
	}
}

func (d *daemon) addNode(ctx context.Context, o *types.BlockdevOptions) error {
	return d.nodes.Add(driver.AtStart(ctx), o)
}

func (d *daemon) startNBD(ctx context.Context, o *types.NbdServerOptions) error {
	return d.nbd.Start(ctx, o)
}

func (d *daemon) addExport(ctx context.Context, o *types.BlockExportOptions) error {
	return d.exports.Add(ctx, o)
}

// enableTrace switches trace points on. A name that matches nothing is only warned about.
func enableTrace(_ *daemon, _ context.Context, it cmdline.Item) error {
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
func (d *daemon) addObject(ctx context.Context, it cmdline.Item) error {
	arg := it.Arg
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
	add := func(d *daemon, _ context.Context, o *types.ObjectOptions) error { return d.objects.Add(o) }
	return structured("qom-type", types.DecodeObjectOptions, add)(d, ctx, it)
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
