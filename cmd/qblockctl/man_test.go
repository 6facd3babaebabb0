package main

import (
	"bytes"
	"flag"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"qblockd/cmd/man"
)

var (
	update  = flag.Bool("update", false, "write the manual page and the completions")
	docsDir = flag.String("docs", "../../docs", "where they are")
)

// TestManPage: qblockctl(1) and the completions say what --help says. "make man" writes them.
func TestManPage(t *testing.T) {
	files := map[string][]byte{"man/qblockctl.1": page((&app{}).commands()).Roff()}
	for shell, name := range map[string]string{"bash": "qblockctl.bash", "fish": "qblockctl.fish", "zsh": "_qblockctl"} {
		var b bytes.Buffer
		if err := run(t.Context(), []string{"completion", shell}, "", &b); err != nil {
			t.Fatal(err)
		}
		files["completion/"+name] = b.Bytes()
	}
	if err := man.Sync(*docsDir, files, *update); err != nil {
		t.Error(err)
	}
}

// page makes the manual page of a tree of commands.
func page(root *cobra.Command) *man.Page {
	p := &man.Page{Name: root.Name(), Section: 1, Title: root.Short, Synopsis: []string{root.Use}}
	about := man.Section{Heading: "Description", Paras: paras(root.Long)}
	examples := man.Section{Heading: "Examples"}
	for l := range strings.Lines(root.Example) {
		examples.Paras = append(examples.Paras, man.Para{Text: strings.TrimSpace(l), Literal: true})
	}
	options := man.Section{Heading: "Options", Items: flags(root.PersistentFlags())}
	options.Items = append(options.Items, flags(root.LocalNonPersistentFlags())...)
	p.Sections = []man.Section{about, options, {Heading: "Commands of qblockctl itself"}}
	root.InitDefaultHelpCmd()
	for _, c := range root.Commands() {
		p.Sections = append(p.Sections, man.Section{
			Heading: root.Name() + " " + c.Use, Sub: true, Paras: paras(c.Long), Items: flags(c.LocalNonPersistentFlags()),
		})
		p.Synopsis = append(p.Synopsis, root.Name()+" [-s SOCKET] "+c.Use)
	}
	p.Sections = append(p.Sections, examples, man.Section{Heading: "See also", Paras: []man.Para{{Text: "qblockd(1)"}}})
	return p
}

func paras(text string) (l []man.Para) {
	for _, s := range strings.Split(text, "\n\n") {
		l = append(l, man.Para{Text: s})
	}
	return l
}

func flags(set *pflag.FlagSet) (l []man.Item) {
	set.VisitAll(func(f *pflag.Flag) {
		arg, text := pflag.UnquoteUsage(f)
		tag := "--" + f.Name
		if f.Shorthand != "" {
			tag = "-" + f.Shorthand + ", " + tag
		}
		if arg != "" {
			tag += " " + arg
		}
		if f.DefValue != "" && f.DefValue != "false" && f.DefValue != "0" {
			text += " (default " + f.DefValue + ")"
		}
		l = append(l, man.Item{Tags: []string{tag}, Text: text})
	})
	return l
}
