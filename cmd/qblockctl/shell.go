package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/peterh/liner"
	"github.com/spf13/cobra"

	"qblockd/cmd/qblockctl/introspect"
)

func (a *app) shellCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "shell",
		Short: "type commands at a prompt, with completion and history",
		Long: "A prompt for commands as qblockctl itself takes them. TAB completes commands, arguments, their values and the names of\n" +
			"nodes, jobs and exports; 'help' COMMAND explains; events are shown as they come ('events off' stops that); 'graph' and\n" +
			"'jobs' work here too; 'exit' or Ctrl-D leaves. Ctrl-C gives up waiting for a command. '...' quotes a word with blanks.\n" +
			"Lines are remembered in $XDG_STATE_HOME/qblockctl/history (by default below ~/.local/state). Without a terminal the\n" +
			"lines of standard input are executed; the exit status is then 1 if one failed.",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			// The line editor and single commands take Ctrl-C themselves.
			s := &shell{app: a, ctx: context.WithoutCancel(cmd.Context()), events: true}
			return s.run()
		},
	}
}

// localWords are the commands of the shell that are not the daemon's.
var localWords = []string{"events", "exit", "graph", "help", "jobs", "schema"}

// shell is an interactive session. The connection's reader prints events while the rest waits for a
// line or a reply.
type shell struct {
	*app
	ctx    context.Context
	conn   *client
	schema *introspect.Schema
	line   *liner.State // nil: standard input is no terminal
	failed bool

	mu      sync.Mutex // one piece of text on the terminal at a time
	prompt  bool       // guarded by mu: a line is being edited
	events  bool       // guarded by mu: show them
	leaving bool       // guarded by mu: the shell closes its connection itself
	hold    bool       // guarded by mu: something else draws on the terminal
	held    []*message // guarded by mu: came meanwhile
}

const promptText = "qblockd> "

func (s *shell) run() error {
	if err := s.connect(); err != nil {
		return err
	}
	defer s.leave()
	if !isTerminal(os.Stdin) || !isTerminal(s.out) {
		return s.batch(os.Stdin)
	}
	s.line = liner.NewLiner()
	defer s.line.Close()
	s.line.SetCtrlCAborts(true)
	s.line.SetTabCompletionStyle(liner.TabPrints)
	s.line.SetWordCompleter(s.complete)
	if f, err := os.Open(historyFile()); err == nil {
		_, _ = s.line.ReadHistory(f) // what cannot be read is not remembered
		f.Close()
	}
	defer s.saveHistory()
	stop := s.endBySignal()
	defer stop()
	fmt.Fprintf(s.out, "Connected to %s. TAB completes, 'help' explains, 'exit' or Ctrl-D leaves.\n", s.socket)
	for {
		s.editing(true)
		text, err := s.line.Prompt(promptText)
		s.editing(false)
		switch {
		case errors.Is(err, liner.ErrPromptAborted):
			continue
		case errors.Is(err, io.EOF):
			fmt.Fprintln(s.out)
			return nil
		case err != nil:
			return err
		}
		if strings.TrimSpace(text) == "" {
			continue
		}
		s.line.AppendHistory(text)
		if s.execute(text) {
			return nil
		}
	}
}

// batch executes the lines of a file.
func (s *shell) batch(in io.Reader) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		if text := strings.TrimSpace(lines.Text()); text == "" || strings.HasPrefix(text, "#") {
			continue
		}
		if s.execute(lines.Text()) {
			break
		}
	}
	if err := lines.Err(); err != nil {
		return err
	}
	if s.failed {
		return errors.New("not all commands succeeded")
	}
	return nil
}

func (s *shell) leave() {
	s.mu.Lock()
	s.leaving = true
	s.mu.Unlock()
	s.conn.close()
}

func (s *shell) connect() error {
	conn, err := dial(s.ctx, s.socket, s.show)
	if err != nil {
		return err
	}
	s.conn, s.schema = conn, liveSchema(s.ctx, conn)
	go s.mourn(conn)
	return nil
}

// mourn says when the daemon has ended a connection. It lives as long as that.
func (s *shell) mourn(conn *client) {
	<-conn.ended
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.leaving {
		s.above(conn.err.Error())
	}
}

// execute does one line; it returns true for the one that leaves the shell.
func (s *shell) execute(text string) (leave bool) {
	words, err := splitLine(text)
	if err == nil && len(words) > 0 {
		if words[0] == "exit" {
			return true
		}
		ctx, stop := signal.NotifyContext(s.ctx, os.Interrupt)
		err = s.words(ctx, words)
		stop()
	}
	switch {
	case err == nil:
		return false
	case errors.Is(err, context.Canceled):
		err = errors.New("given up; the daemon may still be at it")
	}
	s.failed = true
	s.say(s.style.red("error: ") + strings.TrimSuffix(err.Error(), "; "+errUsage.Error()))
	if h := hint(err); h != "" {
		s.say("  " + h)
	}
	return false
}

func (s *shell) words(ctx context.Context, words []string) error {
	switch command := words[0]; command {
	case "events":
		return s.switchEvents(words[1:])
	case "help":
		if len(words) == 1 {
			return s.overview()
		}
		if s.schema.Has(words[1]) {
			return s.style.help(s.out, s.schema, words[1], words[2:])
		}
		return s.local(ctx, words)
	case "graph", "jobs", "schema":
		return s.local(ctx, words)
	}
	arguments, err := parseArguments(words[1:])
	if err != nil {
		return err
	}
	if words[0] == "quit" && s.line != nil && !s.sure("This ends the daemon ('exit' leaves the shell). Go on? (y/n) ") {
		return nil
	}
	select {
	case <-s.conn.ended:
		if err := s.connect(); err != nil {
			return err
		}
		s.say("connected again")
	default:
	}
	result, err := s.conn.execute(ctx, words[0], arguments)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return printJSON(s.out, result)
}

// local does a command of qblockctl itself, on a connection of its own. Events wait meanwhile.
func (s *shell) local(ctx context.Context, words []string) error {
	s.holding(true)
	defer s.holding(false)
	return run(ctx, append([]string{"-s", s.socket}, words...), "", s.out)
}

func (s *shell) overview() error {
	_, err := fmt.Fprintf(s.out, "Commands of the daemon ('help COMMAND' explains one):\n%s\n"+
		"Commands of the shell:\n"+
		"  graph [--format text|dot|svg] [-o FILE]   the block nodes and who uses them\n"+
		"  jobs [--watch]                            jobs, or their progress until they are done\n"+
		"  events on|off                             show events as they come, or do not\n"+
		"  schema [COMMAND...]                       JSON Schemas\n"+
		"  help [COMMAND [KEY=VALUE...]]             this text, or what a command takes\n"+
		"  exit                                      leave; the daemon goes on\n",
		wrap(strings.Join(s.schema.Commands(), " "), "  ", 100))
	return err
}

func (s *shell) switchEvents(words []string) error {
	if len(words) != 1 || words[0] != "on" && words[0] != "off" {
		return errors.New("it is 'events on' or 'events off'")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = words[0] == "on"
	return nil
}

// sure asks a question; it is true only for an answer that begins with y.
func (s *shell) sure(question string) bool {
	answer, err := s.line.Prompt(question)
	return err == nil && strings.HasPrefix(strings.ToLower(strings.TrimSpace(answer)), "y")
}

// show prints an event, above the line that is being edited. The connection's reader calls it.
func (s *shell) show(m *message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.events:
	case s.hold:
		s.held = append(s.held, m)
	default:
		s.above(s.style.event(m))
	}
}

// above prints a line. While one is edited, it takes that one's place, and the editor draws it
// again below: the editor does so when the size of the terminal changes, so it is told that.
func (s *shell) above(text string) {
	if !s.prompt {
		fmt.Fprintln(s.out, text)
		return
	}
	fmt.Fprint(s.out, "\r\x1b[K"+text+"\n")
	_ = syscall.Kill(syscall.Getpid(), syscall.SIGWINCH) // to ourselves: cannot fail
}

func (s *shell) say(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintln(s.out, text)
}

func (s *shell) editing(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.prompt = on
}

func (s *shell) holding(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hold = on
	if !on {
		for _, m := range s.held {
			fmt.Fprintln(s.out, s.style.event(m))
		}
		s.held = nil
	}
}

// complete is the editor's question what the word before the cursor can become.
func (s *shell) complete(line string, pos int) (head string, completions []string, tail string) {
	runes := []rune(line)
	left, tail := string(runes[:pos]), string(runes[pos:])
	words, last, err := scanLine(left)
	if err != nil || !strings.HasSuffix(left, last) {
		return left, nil, tail
	}
	head = left[:len(left)-len(last)]
	for _, w := range s.next(words, last) {
		if !goesOn(w) {
			w += " "
		}
		completions = append(completions, w)
	}
	return head, completions, tail
}

// next returns what last can become behind words.
func (s *shell) next(words []string, last string) []string {
	c := &completer{schema: s.schema, names: s.names}
	if len(words) == 0 {
		return c.commands(last, localWords...)
	}
	switch words[0] {
	case "help":
		if len(words) == 1 {
			return c.commands(last, localWords...)
		}
		words = words[1:]
	case "events":
		return begins([]string{"off", "on"}, last)
	case "graph":
		if l := words[len(words)-1]; l == "--format" || l == "-f" {
			return begins([]string{"dot", "svg", "text"}, last)
		}
		return begins([]string{"--format", "--output"}, last)
	case "jobs":
		return begins([]string{"--watch"}, last)
	case "schema":
		return c.commands(last)
	}
	return slices.Compact(c.argument(words[0], words[1:], last))
}

// names asks the daemon while a line is edited; it does not wait long.
func (s *shell) names(k kind, prefix string) []string {
	ctx, cancel := context.WithTimeout(s.ctx, time.Second)
	defer cancel()
	return liveNames(ctx, s.conn, k, prefix)
}

// endBySignal leaves the terminal as it was when the shell is told to end from outside.
func (s *shell) endBySignal() (stop func()) {
	signals, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		select {
		case <-signals:
			s.saveHistory()
			s.line.Close()
			os.Exit(143)
		case <-done:
		}
	}()
	return func() { signal.Stop(signals); close(done) }
}

// historyFile is where lines are remembered from one shell to the next.
func historyFile() string {
	dir := os.Getenv("XDG_STATE_HOME")
	if !filepath.IsAbs(dir) {
		home, err := os.UserHomeDir()
		if err != nil {
			return ""
		}
		dir = filepath.Join(home, ".local", "state")
	}
	return filepath.Join(dir, "qblockctl", "history")
}

// saveHistory writes the lines, for the owner alone: they may hold secrets. Where that fails they
// are forgotten.
func (s *shell) saveHistory() {
	name := historyFile()
	if name == "" || os.MkdirAll(filepath.Dir(name), 0o700) != nil {
		return
	}
	f, err := os.CreateTemp(filepath.Dir(name), "history-")
	if err != nil {
		return
	}
	_, err = s.line.WriteHistory(f)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		os.Remove(f.Name())
	}
}
