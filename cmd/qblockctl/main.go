// Command qblockctl is the client of qblockd for people and scripts.
//
//	main.go     options, and what each word does
//	client.go   a QMP client: one connection, one command at a time, or the events as they come
//	args.go     key=value words -> the arguments of a command
//	schema.go   the JSON Schemas of the commands
//
// It exits with 0 if all went well, 1 if the daemon refused the command or could not be reached, 2 if it was
// called in a wrong way.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

const usage = `usage: qblockctl [-s SOCKET] COMMAND [KEY=VALUE...]

  COMMAND [KEY=VALUE...]    execute a QMP command and print what it returns. Dotted keys nest (file.driver=file),
                            numbers as keys make lists (nodes.0=a). A VALUE that is JSON is taken as such
                            (true, 12, '["a"]', '"12"'), any other is a string. Or give all arguments as
                            one JSON object: COMMAND '{"node-name": "disk"}'
  events [-json] [NAME...]  print events as they come, all or those named, until the daemon ends
  schema [NAME...]          print the JSON Schema of QMP commands (all of them by default)
  help                      this text; 'qblockctl query-commands' lists the commands of a running daemon

  -s SOCKET   the daemon's QMP socket: a path, or tcp:HOST:PORT. Default: $QBLOCKD_SOCK, else run/qmp.sock
`

// defaultSocket is where "make run" puts the monitor.
const defaultSocket = "run/qmp.sock"

// errUsage: the words make no sense; what is wrong is wrapped around it.
var errUsage = errors.New("see 'qblockctl help'")

func main() {
	err := run(os.Args[1:], os.Getenv("QBLOCKD_SOCK"), os.Stdout)
	switch {
	case err == nil:
		return
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "qblockctl:", err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "qblockctl:", err)
		os.Exit(1)
	}
}

// run does what the words in args say; socket is the daemon's unless -s names another.
func run(args []string, socket string, out io.Writer) error {
	if socket == "" {
		socket = defaultSocket
	}
	f := flag.NewFlagSet("qblockctl", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&socket, "s", socket, "")
	switch err := f.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		_, err = io.WriteString(out, usage)
		return err
	case err != nil:
		return fmt.Errorf("%w; %w", err, errUsage)
	case f.NArg() == 0:
		return fmt.Errorf("no command; %w", errUsage)
	}
	word, rest := f.Arg(0), f.Args()[1:]
	switch word {
	case "help":
		_, err := io.WriteString(out, usage)
		return err
	case "schema":
		return runSchema(rest, out)
	case "events":
		return runEvents(socket, rest, out)
	}
	return runCommand(socket, word, rest, out)
}

// runCommand executes one command and prints what it returns.
func runCommand(socket, command string, words []string, out io.Writer) error {
	arguments, err := parseArguments(words)
	if err != nil {
		return fmt.Errorf("%w; %w", err, errUsage)
	}
	c, err := dial(socket)
	if err != nil {
		return err
	}
	defer c.close()
	result, err := c.execute(command, arguments)
	if err != nil {
		return err
	}
	return printJSON(out, result)
}

// runEvents prints events until the daemon ends the connection.
func runEvents(socket string, words []string, out io.Writer) error {
	f := flag.NewFlagSet("events", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	asJSON := f.Bool("json", false, "")
	if err := f.Parse(words); err != nil {
		return fmt.Errorf("%w; %w", err, errUsage)
	}
	names := map[string]bool{}
	for _, n := range f.Args() {
		names[n] = true
	}
	c, err := dial(socket)
	if err != nil {
		return err
	}
	defer c.close()
	for {
		m, err := c.event()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(names) > 0 && !names[m.Event] {
			continue
		}
		line := m.line()
		if *asJSON {
			line = string(m.raw)
		}
		if _, err := fmt.Fprintln(out, line); err != nil {
			return err
		}
	}
}
