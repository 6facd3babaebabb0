package main

import (
	"fmt"
	"runtime/debug"
	"strings"
)

// optionHelp explains an option: --help, the manual page and the shells' completions are made of these.
type optionHelp struct {
	long  string   // without dashes
	short byte     // 0: none
	args  []string // the forms of its argument; none if it takes none
	text  string   // one paragraph
}

// aboutText is what the program is, in the words that stand above the options.
const aboutText = "Block devices as a service: open disk images, export them, and work on them live, over QMP."

// orderText is the one rule about options.
const orderText = "Options take effect strictly from left to right: define what another option names before it."

// endText is how it ends.
const endText = "SIGTERM, SIGINT, SIGHUP and the QMP command quit end it in order: jobs are cancelled, exports closed, data flushed. " +
	"The exit status is then 0; it is 1 if an option cannot be done."

// helpGroups are all options, in the groups and the order in which they are shown.
var helpGroups = [][]optionHelp{
	{
		{"help", 'h', nil, "show this text and exit"},
		{"version", 'V', nil, "show the version and exit"},
		{"trace", 'T', []string{"[enable=]<pattern>"}, "log the trace points that match; 'help' lists them"},
	}, {
		{"blockdev", 0, []string{"[driver=]<driver>,node-name=<name>[,<option>=<value>...]"},
			"open a block node, as QMP blockdev-add does; nested options are dotted (file.driver=file), or the whole may be JSON"},
		{"chardev", 0, []string{"<backend>,id=<id>[,<option>=<value>...]"},
			"make a character device, for instance socket,id=m,path=qmp.sock,server=on,wait=off; 'help' lists the backends"},
		{"monitor", 0, []string{"[chardev=]<id>[,mode=control][,pretty=on|off]"},
			"speak QMP on a character device, to any number of clients at once"},
		{"nbd-server", 0, []string{
			"addr.type=unix,addr.path=<path>[,max-connections=<n>]",
			"addr.type=inet,addr.host=<host>,addr.port=<port>[,max-connections=<n>]"}, "start the NBD server"},
		{"export", 0, []string{"[type=]nbd,id=<id>,node-name=<node>[,name=<name>][,writable=on|off]"},
			"export a node over NBD; needs --nbd-server before it"},
		{"object", 0, []string{"<type>,id=<id>[,<property>=<value>...]"},
			"make an object; 'help' lists the types, '<type>,help' their properties"},
	}, {
		{"daemonize", 0, nil, "go to the background once all options have taken effect, wherever it stands; then the working folder is / and the log goes nowhere"},
		{"pidfile", 0, []string{"<path>"}, "write the process id to a file, locked while the daemon lives"},
		{"socket-mode", 0, []string{"<octal>"}, "permissions of the socket files that the daemon makes, wherever the option stands (default 0600)"},
		{"limit", 0, []string{"<name>=<value>[,...]"},
			"bound what clients can make the daemon hold; 'help' lists the names and their defaults"},
		{"image-policy", 0, []string{"<name>=<value>[,...]"},
			"what the headers of images may name as backing files; 'help' lists the names and their defaults"},
		{"quickstart", 0, []string{"<dir>"},
			"serve a new disk with a monitor and an NBD server, all below <dir>, and show what to try"},
	},
}

func versionText(prog string) string {
	rev := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				rev = " (" + s.Value[:12] + ")"
			}
		}
	}
	return fmt.Sprintf("%s version %s%s\nA drop-in for the QEMU %d.%d storage daemon. Apache License 2.0.\n",
		prog, version, rev, qemuMajor, qemuMinor)
}

// helpColumn is where the explanations of --help begin, helpWidth where they end at the latest.
const helpColumn, helpWidth = 25, 96

func helpText(prog string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Usage: %s [options]\n%s\n%s\n", prog, aboutText, orderText)
	for _, group := range helpGroups {
		b.WriteByte('\n')
		for _, o := range group {
			o.write(&b)
		}
	}
	b.WriteByte('\n')
	(&optionHelp{text: endText}).fill(&b, 0, 0)
	return b.String()
}

// forms are the ways to write the option, in short and long.
func (o *optionHelp) forms() (l []string) {
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
func (o *optionHelp) write(b *strings.Builder) {
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
func (o *optionHelp) fill(b *strings.Builder, column, indent int) {
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
