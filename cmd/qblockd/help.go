package main

import (
	"fmt"
	"strings"

	"qblockd/cmd/version"
)

// aboutText is what the program is, in the words that stand above the options.
const aboutText = "Block devices as a service: open disk images, export them, and work on them live, over QMP."

// orderText is the one rule about options.
const orderText = "Options take effect strictly from left to right: define what another option names before it."

// endText is how it ends.
const endText = "SIGTERM, SIGINT, SIGHUP and the QMP command quit end it in order: jobs are cancelled, exports closed, data flushed. " +
	"The exit status is then 0; it is 1 if an option cannot be done."

func versionText(prog string) string {
	return fmt.Sprintf("%sA drop-in for the QEMU %d.%d storage daemon. Apache License 2.0.\n",
		version.Line(prog), qemuMajor, qemuMinor)
}

// helpColumn is where the explanations of --help begin, helpWidth where they end at the latest.
const helpColumn, helpWidth = 25, 96

func helpText(prog string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s [options]\n%s\n%s\n", prog, aboutText, orderText)
	for _, group := range optionGroups() {
		b.WriteByte('\n')
		for _, o := range group {
			o.write(&b)
		}
	}
	b.WriteByte('\n')
	(&option{text: endText}).fill(&b, 0, 0)
	return b.String()
}

// forms are the ways to write the option, in short and long.
func (o *option) forms() (l []string) {
	name := "--" + o.long
	if o.short != 0 {
		name = "-" + string(o.short) + ", " + name
	}
	for _, a := range o.args {
		l = append(l, name+" "+a)
	}
	if l == nil {
		l = []string{name}
	}
	return l
}

// write shows the option: its forms, a line each, and its text behind the last or below.
func (o *option) write(b *strings.Builder) {
	forms := o.forms()
	b.WriteString("  " + strings.Join(forms, "\n  "))
	column := 2 + len(forms[len(forms)-1])
	if column > helpColumn-2 {
		b.WriteByte('\n')
		column = 0
	}
	o.fill(b, column, helpColumn)
}

// fill writes the text from indent on, column being where the line ends so far.
func (o *option) fill(b *strings.Builder, column, indent int) {
	for i, word := range strings.Fields(o.text) {
		switch {
		case i > 0 && column+1+len(word) > helpWidth:
			b.WriteByte('\n')
			column = 0
			fallthrough
		case i == 0:
			b.WriteString(strings.Repeat(" ", indent-column))
			column = indent
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	b.WriteByte('\n')
}
