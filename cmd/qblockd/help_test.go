package main

import (
	"slices"
	"strings"
	"testing"

	"qblockd/cmd/qblockd/cmdline"
)

// TestHelpIsComplete: the options that are scanned are those that are explained, with the same letters and arguments.
func TestHelpIsComplete(t *testing.T) {
	var explained []cmdline.Option
	for _, group := range helpGroups {
		for _, o := range group {
			explained = append(explained, cmdline.Option{Long: o.long, Short: o.short, Arg: len(o.args) > 0})
			if o.text == "" {
				t.Errorf("--%s is not explained", o.long)
			}
		}
	}
	for _, o := range options {
		if !slices.Contains(explained, o) {
			t.Errorf("%+v is scanned, but not explained so", o)
		}
	}
	if len(explained) != len(options) {
		t.Errorf("%d options explained, %d scanned", len(explained), len(options))
	}
}

func TestHelpText(t *testing.T) {
	text := helpText("prog")
	if !strings.HasPrefix(text, "Usage: prog [options]\n") {
		t.Errorf("begins %.40q", text)
	}
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "   ") && len(line) > helpWidth+1 {
			t.Errorf("%d columns: %s", len(line), line)
		}
		if strings.TrimRight(line, " \n")+"\n" != line {
			t.Errorf("blanks at the end of %q", line)
		}
	}
	for _, want := range []string{
		"\n  -h, --help             show this text and exit\n",
		"\n  -T, --trace [enable=]<pattern>\n                         log the trace points that match; 'help' lists them\n",
		"\n  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]\n  --nbd-server addr.type=inet,",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("lacks %q:\n%s", want, text)
		}
	}
}
