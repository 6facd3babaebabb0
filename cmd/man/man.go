// Package man writes manual pages, and completions for shells, out of what a command's --help is
// made of. It is pure and deterministic: no dates, so that a page changes only when the command
// does.
package man

import (
	"fmt"
	"strings"
)

// Page is a manual page.
type Page struct {
	Name     string // of the command
	Section  int
	Title    string // one line: what it is
	Synopsis []string
	Sections []Section
}

// Section is a part of a page under a heading. The paragraphs come first, then the items.
type Section struct {
	Heading string
	Sub     bool // below the section before
	Paras   []Para
	Items   []Item
}

// Para is a paragraph: text that is filled, or lines that stay as they are.
type Para struct {
	Text    string
	Literal bool
}

// Item is something explained.
type Item struct {
	Tags []string // one or more ways to write it, a line each
	Text string
}

// Roff returns the page in the language of man(7).
func (p *Page) Roff() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, ".\\\" Made of the command's own help by 'make man'. Do not edit.\n.TH %s %d \"\" \"qblockd\" \"qblockd\"\n",
		quote(strings.ToUpper(p.Name)), p.Section)
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n.SH SYNOPSIS\n", text(p.Name), text(p.Title))
	for i, s := range p.Synopsis {
		if i > 0 {
			b.WriteString(".br\n")
		}
		word, rest, _ := strings.Cut(s, " ")
		fmt.Fprintf(&b, ".B %s\n%s", text(word), line(rest))
	}
	for _, s := range p.Sections {
		if s.Sub {
			fmt.Fprintf(&b, ".SS %s\n", quote(s.Heading))
		} else {
			fmt.Fprintf(&b, ".SH %s\n", quote(strings.ToUpper(s.Heading)))
		}
		for i, para := range s.Paras {
			if i > 0 {
				b.WriteString(".PP\n")
			}
			para.write(&b)
		}
		for _, it := range s.Items {
			it.write(&b)
		}
	}
	return []byte(b.String())
}

func (p *Para) write(b *strings.Builder) {
	if !p.Literal {
		b.WriteString(line(strings.Join(strings.Fields(p.Text), " ")))
		return
	}
	b.WriteString(".RS 4\n.nf\n")
	for l := range strings.Lines(strings.TrimRight(p.Text, "\n")) {
		b.WriteString(line(strings.TrimRight(l, "\n")))
	}
	b.WriteString(".fi\n.RE\n")
}

func (it *Item) write(b *strings.Builder) {
	for i, tag := range it.Tags {
		if i == 0 {
			b.WriteString(".TP\n")
		} else {
			b.WriteString(".TQ\n")
		}
		b.WriteString(".B " + text(tag) + "\n")
	}
	b.WriteString(line(strings.Join(strings.Fields(it.Text), " ")))
}

// text escapes what roff would take for its own.
func text(s string) string {
	return strings.NewReplacer(`\`, `\e`, "-", `\-`, "'", `\(aq`, "`", `\(ga`, "^", `\(ha`, "~", `\(ti`, `"`, `\(dq`).Replace(s)
}

// line is text on a line of its own: one that begins with a dot is not a request.
func line(s string) string {
	if s == "" {
		return ""
	}
	s = text(s)
	if s[0] == '.' {
		s = `\&` + s
	}
	return s + "\n"
}

func quote(s string) string { return `"` + text(s) + `"` }
