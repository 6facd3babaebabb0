package main

import (
	"flag"
	"testing"

	"qblockd/cmd/man"
)

var (
	update  = flag.Bool("update", false, "write the manual page and the completions")
	docsDir = flag.String("docs", "../../docs", "where they are")
)

// TestManPage: qblockd(1) and the completions of its options say what --help says. "make man"
// writes them.
func TestManPage(t *testing.T) {
	about := man.Section{Heading: "Description", Paras: []man.Para{{Text: aboutText}, {Text: orderText}}}
	opts := man.Section{Heading: "Options"}
	var completed []man.Option
	for _, group := range optionGroups() {
		for _, o := range group {
			opts.Items = append(opts.Items, man.Item{Tags: o.forms(), Text: o.text})
			completed = append(completed, man.Option{Long: o.long, Short: o.short, Arg: len(o.args) > 0, Text: o.text})
		}
	}
	page := man.Page{
		Name: "qblockd", Section: 1, Title: "QEMU's block layer as a service of its own, spoken to over QMP",
		Synopsis: []string{"qblockd [options]"},
		Sections: []man.Section{
			about, opts, {Heading: "Ending", Paras: []man.Para{{Text: endText}}},
			{Heading: "See also", Paras: []man.Para{{Text: "qblockctl(1), qemu-storage-daemon(1), qemu-img(1)"}}},
		},
	}
	err := man.Sync(*docsDir, map[string][]byte{
		"man/qblockd.1":           page.Roff(),
		"completion/qblockd.bash": man.Completion("bash", "qblockd", completed),
		"completion/qblockd.fish": man.Completion("fish", "qblockd", completed),
		"completion/_qblockd":     man.Completion("zsh", "qblockd", completed),
	}, *update)
	if err != nil {
		t.Error(err)
	}
}
