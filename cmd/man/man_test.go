package man

import (
	"bytes"
	"os/exec"
	"strings"
	"testing"
)

var page = Page{
	Name: "tool", Section: 1, Title: "does it", Synopsis: []string{"tool [-x] FILE", "tool --help"},
	Sections: []Section{
		{Heading: "Description", Paras: []Para{{Text: "First  line\nof 'text' with \\ and --dashes."}, {Text: ".dot\n  in $HOME\n", Literal: true}, {Text: ".Last"}}},
		{Heading: "Sub part", Sub: true},
		{Heading: "Options", Items: []Item{{Tags: []string{"-x, --long <a|b>", "--long=c"}, Text: "what it\ndoes"}}},
	},
}

func TestRoff(t *testing.T) {
	want := `.\" Made of the command's own help by 'make man'. Do not edit.
.TH "TOOL" 1 "" "qblockd" "qblockd"
.SH NAME
tool \- does it
.SH SYNOPSIS
.B tool
[\-x] FILE
.br
.B tool
\-\-help
.SH "DESCRIPTION"
First line of \(aqtext\(aq with \e and \-\-dashes.
.PP
.RS 4
.nf
\&.dot
  in $HOME
.fi
.RE
.PP
\&.Last
.SS "Sub part"
.SH "OPTIONS"
.TP
.B \-x, \-\-long <a|b>
.TQ
.B \-\-long=c
what it does
`
	if got := string(page.Roff()); got != want {
		t.Errorf("%s", got)
	}
}

// TestFormatters shows the page with what displays pages.
func TestFormatters(t *testing.T) {
	for _, words := range [][]string{{"mandoc", "-Tascii", "-Wwarning"}, {"groff", "-man", "-Tascii", "-ww", "-P-c"}} {
		if _, err := exec.LookPath(words[0]); err != nil {
			t.Logf("SKIPPED: %s is not installed", words[0])
			continue
		}
		cmd := exec.Command(words[0], words[1:]...)
		cmd.Stdin = bytes.NewReader(page.Roff())
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		// mandoc wants a date in .TH, and names it.
		if text := string(out); err != nil && words[0] != "mandoc" || !strings.Contains(text, "what it does") || !strings.Contains(text, ".dot") {
			t.Errorf("%s: %v %s\n%s", words[0], err, stderr.String(), text)
		}
	}
}

func TestCompletion(t *testing.T) {
	options := []Option{{"help", 'h', false, "it's [help]: all"}, {"file", 0, true, "a file"}}
	for _, shell := range []string{"bash", "fish", "zsh"} {
		text := Completion(shell, "tool", options)
		if !bytes.Contains(text, []byte("help")) || !bytes.HasSuffix(text, []byte("\n")) {
			t.Errorf("%s:\n%s", shell, text)
		}
		if _, err := exec.LookPath(shell); err != nil {
			t.Logf("SKIPPED: %s is not installed", shell)
			continue
		}
		cmd := exec.Command(shell, "-n", "/dev/stdin")
		cmd.Stdin = bytes.NewReader(text)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s\n%s", shell, err, out, text)
		}
	}
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("SKIPPED: bash is not installed")
	}
	script := string(Completion("bash", "tool", options)) + "COMP_WORDS=(tool --fi); COMP_CWORD=1; _tool; echo \"${COMPREPLY[@]}\"\n"
	if out, err := exec.Command("bash", "-c", script).CombinedOutput(); err != nil || string(out) != "--file\n" {
		t.Errorf("%v %s", err, out)
	}
}
