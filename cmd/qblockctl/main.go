// Command qblockctl is the client of qblockd for people and scripts.
//
//	main.go      the tree of commands: makes --help, the manual page and the shells' completions
//	client.go    a QMP client: one command at a time, events as they come
//	args.go      key=value words -> the arguments of a command; words.go: a line -> words
//	complete.go  what may come next, from the daemon's schema and live.go's names
//	help.go      help on QMP commands
//	shell.go     the interactive shell
//	completion.go  scripts that make other shells complete
//	events.go jobs.go watch.go graph.go schema.go check.go amend.go measure.go snapshot.go
//	resize.go    the commands of those names
//	hint.go      what to do about errors
//	own.go       a daemon of its own, for commands that work on image files;  image.go: their nodes
//	introspect/  what query-qmp-schema says;  picture/  graphs as text, dot and SVG
//
// It exits with 0 if all went well, 1 if the daemon refused the command or could not be reached, 2
// if it was called in a wrong way.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"qblockd/cmd/qblockctl/introspect"
	"qblockd/cmd/version"
	"qblockd/schema"
)

// defaultSocket is where "make run" puts the monitor.
const defaultSocket = "run/qmp.sock"

// errUsage: the words make no sense; what is wrong is wrapped around it.
var errUsage = errors.New("see 'qblockctl help'")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Getenv("QBLOCKD_SOCK"), os.Stdout)
	var status *statusError
	switch {
	case err == nil:
		return
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "qblockctl:", err)
		os.Exit(2)
	case errors.As(err, &status):
		if status.err != nil {
			complain(status.err)
		}
		os.Exit(status.code)
	case errors.Is(err, context.Canceled):
		os.Exit(130) // Ctrl-C, as a shell says it
	default:
		complain(err)
		os.Exit(1)
	}
}

// complain says what went wrong, and what to do about it.
func complain(err error) {
	fmt.Fprintln(os.Stderr, "qblockctl:", err)
	if h := hint(err); h != "" {
		fmt.Fprintln(os.Stderr, "  "+h)
	}
}

// statusError is an exit status that says more than that something went wrong; err may be nil.
type statusError struct {
	code int
	err  error
}

func (e *statusError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit status %d", e.code)
	}
	return e.err.Error()
}

// Unwrap lets others see what it is about.
func (e *statusError) Unwrap() error { return e.err }

// run does what the words in args say; socket is the daemon's unless -s names another.
func run(ctx context.Context, args []string, socket string, out io.Writer) error {
	a := &app{socket: socket, out: out, style: styleOf(out)}
	root := a.commands()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(io.Discard)
	return root.ExecuteContext(ctx)
}

// app is what all commands share.
type app struct {
	socket string
	out    io.Writer
	style  style
}

const rootLong = `qblockctl executes QMP commands of a running qblockd, shows what it does, and offers a shell.

COMMAND is any command of the daemon ('qblockctl help' COMMAND explains it, 'qblockctl query-commands' lists them), with
its arguments as KEY=VALUE: dotted keys nest (file.driver=file), numbers as keys make lists (nodes.0=a). A VALUE that
is JSON is taken as such (true, 12, '["a"]', '"12"'), any other is a string. Or give all arguments as one JSON object.
What the command returns is printed as JSON.

The exit status is 0 if all went well, 1 if the daemon refused the command or could not be reached, 2 for words that make
no sense. Colours are for terminals only, and not used if NO_COLOR is set.`

// commands builds the tree of commands.
func (a *app) commands() *cobra.Command {
	if a.socket == "" {
		a.socket = defaultSocket
	}
	root := &cobra.Command{
		Use:     "qblockctl [-s SOCKET] COMMAND [KEY=VALUE...]",
		Short:   "talk to a running qblockd",
		Long:    rootLong,
		Version: version.Version,
		Example: "  qblockctl query-named-block-nodes flat=true\n" +
			"  qblockctl blockdev-add driver=qcow2 node-name=disk file.driver=file file.filename=disk.qcow2\n" +
			"  qblockctl -s tcp:localhost:4444 block-export-del '{\"id\": \"disk\"}'",
		Args:              cobra.ArbitraryArgs,
		SilenceErrors:     true,
		SilenceUsage:      true,
		ValidArgsFunction: a.completeCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("no command; %w", errUsage)
			}
			return a.command(cmd.Context(), args[0], args[1:])
		},
	}
	root.PersistentFlags().StringVarP(&a.socket, "socket", "s", a.socket,
		"the daemon's QMP `SOCKET`: a path, or tcp:HOST:PORT; $QBLOCKD_SOCK is taken if set")
	root.PersistentFlags().BoolP("help", "h", false, "show help and exit")
	root.Flags().BoolP("version", "V", false, "show the version and exit")
	root.SetVersionTemplate(version.Line("qblockctl"))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		if cmd.HasParent() {
			return usage(cmd.Name(), "%v", err)
		}
		return fmt.Errorf("%w; %w", err, errUsage)
	})
	root.AddCommand(a.shellCommand(), a.graphCommand(), a.jobsCommand(), a.eventsCommand(), a.schemaCommand(),
		a.checkCommand(), a.amendCommand(), a.measureCommand(), a.snapshotCommand(), a.resizeCommand(),
		a.completionCommand())
	root.SetHelpCommand(a.helpCommand())
	root.CompletionOptions.DisableDefaultCmd = true
	return root
}

// command executes one command and prints what it returns.
func (a *app) command(ctx context.Context, command string, words []string) error {
	arguments, err := parseArguments(words)
	if err != nil {
		return fmt.Errorf("%w; %w", err, errUsage)
	}
	c, err := dial(ctx, a.socket, nil)
	if err != nil {
		return err
	}
	defer c.close()
	result, err := c.execute(ctx, command, arguments)
	if err != nil {
		return err
	}
	return printJSON(a.out, result)
}

// completeCommand completes the words of a QMP command for the shells.
func (a *app) completeCommand(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	c, stop := a.completer(cmd.Context())
	defer stop()
	if len(args) == 0 {
		return c.commands(word), cobra.ShellCompDirectiveNoFileComp
	}
	l := c.argument(args[0], args[1:], word)
	if slices.ContainsFunc(l, goesOn) {
		return l, cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveNoSpace
	}
	return l, cobra.ShellCompDirectiveNoFileComp
}

// goesOn tells whether a completed word is to be continued without a blank.
func goesOn(word string) bool { return strings.ContainsAny(word[max(0, len(word)-1):], "=./") }

// completer connects to the daemon for what it knows; without one it takes the schema that is built
// in.
func (a *app) completer(ctx context.Context) (c *completer, stop func()) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	conn, err := dial(ctx, a.socket, nil)
	if err != nil {
		cancel()
		return &completer{schema: builtin()}, func() {}
	}
	names := func(k kind, prefix string) []string { return liveNames(ctx, conn, k, prefix) }
	return &completer{schema: liveSchema(ctx, conn), names: names}, func() { conn.close(); cancel() }
}

// builtin is the schema of the qblockd that this program was built with.
func builtin() *introspect.Schema {
	s, err := introspect.Parse(schema.QueryQMPSchema())
	if err != nil {
		panic(err) // it is ours
	}
	return s
}

// usageArgs makes refusals of arguments usage errors.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usage(cmd.Name(), "%v", err)
		}
		return nil
	}
}
