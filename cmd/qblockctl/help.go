package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"qblockd/cmd/qblockctl/introspect"
	"qblockd/schema"
)

func (a *app) helpCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "help [COMMAND [KEY=VALUE...]]",
		Short: "explain qblockctl, or a command of the daemon",
		Long: "Explains the commands of qblockctl, or one of the daemon: which arguments it takes, of which type. Some arguments decide\n" +
			"which others there are: 'qblockctl help blockdev-add driver=qcow2' shows those of qcow2, and 'qblockctl help\n" +
			"blockdev-add driver=qcow2 file.driver=file file.' those of its file.",
		ValidArgsFunction: a.completeCommand,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Root().Help()
			}
			if sub, _, err := cmd.Root().Find(args[:1]); err == nil && sub != cmd.Root() {
				return sub.Help()
			}
			c, stop := a.completer(cmd.Context())
			defer stop()
			return a.style.help(a.out, c.schema, args[0], args[1:])
		},
	}
}

// help explains a command of the daemon and those of its arguments that there are when words are
// given. A last word without "=" that ends in a dot is a place to look at.
func (s style) help(out io.Writer, sc *introspect.Schema, command string, words []string) error {
	if !sc.Has(command) {
		return fmt.Errorf("there is no command '%s'; 'qblockctl query-commands' lists all", command)
	}
	given, prefix := givenIn(words), ""
	if n := len(words); n > 0 && !strings.Contains(words[n-1], "=") {
		prefix = strings.TrimSuffix(words[n-1], ".") + "."
	}
	prose := introspect.NewProse(schema.JSONSchema(command))
	members := sc.Members(command, prefix, given.text)
	var b strings.Builder
	if prefix == "" {
		b.WriteString(s.bold(command))
		for _, m := range members {
			if !m.Optional {
				fmt.Fprintf(&b, " %s=%s", m.Name, strings.ToUpper(m.Name))
			}
		}
		b.WriteString("\n")
		if text := prose.Text(); text != "" {
			b.WriteString(wrap(text, "  ", 100))
		}
	}
	if len(members) == 0 && prefix != "" {
		return fmt.Errorf("%s has no '%s'", command, prefix)
	}
	for _, m := range members {
		b.WriteString("\n  " + s.bold(prefix+m.Name))
		if m.Optional {
			b.WriteString(s.dim(" (optional)"))
		}
		b.WriteString(": " + shortList(sc.Describe(m.Type)) + "\n")
		if text := prose.Of(prefix+m.Name, given.text).Text(); text != "" {
			b.WriteString(wrap(text, "      ", 100))
		}
	}
	b.WriteString(more(sc, command, prefix, words, members))
	_, err := io.WriteString(out, b.String())
	return err
}

// more tells how to see what help does not show yet: members that depend on the value of another
// one, and those of objects.
func more(sc *introspect.Schema, command, prefix string, words []string, members []introspect.Member) string {
	said, place := "help "+command, ""
	if prefix != "" {
		words, place = words[:len(words)-1], " "+prefix
	}
	if len(words) > 0 {
		said += " " + strings.Join(words, " ")
	}
	text := ""
	if tag := sc.OpenTag(command, prefix, givenIn(words).text); tag != "" {
		text = fmt.Sprintf("\nMore depends on %s: '%s %s=...%s' shows it.\n", prefix+tag, said, prefix+tag, place)
	}
	for _, m := range members {
		if object, other := sc.Object(m.Type); object && !other {
			text += fmt.Sprintf("\nWhat %s has: '%s %s.' shows it.\n", prefix+m.Name, said, prefix+m.Name)
		}
	}
	return text
}

// shortList cuts a list of very many alternatives.
func shortList(s string) string {
	if l := strings.Split(s, "|"); len(l) > 24 {
		return strings.Join(l[:24], "|") + "|..."
	}
	return s
}

// wrap breaks a text into indented lines of at most width columns.
func wrap(text, indent string, width int) string {
	var b strings.Builder
	column := 0
	for _, w := range strings.Fields(text) {
		switch {
		case column == 0:
			b.WriteString(indent)
			column = len(indent)
		case column+1+len(w) > width:
			b.WriteString("\n" + indent)
			column = len(indent)
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(w)
		column += len(w)
	}
	if column > 0 {
		b.WriteByte('\n')
	}
	return b.String()
}
