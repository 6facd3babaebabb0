package main

import (
	"slices"
	"strings"
	"testing"
)

// TestOptions: each option is explained, and done in one of the two passes.
func TestOptions(t *testing.T) {
	for _, o := range slices.Concat(optionGroups()...) {
		if o.text == "" || (o.process == nil) == (o.apply == nil) {
			t.Errorf("--%s: %q, in the first pass %v, in turn %v", o.long, o.text, o.process != nil, o.apply != nil)
		}
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
