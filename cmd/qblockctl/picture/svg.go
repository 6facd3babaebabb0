package picture

import (
	"encoding/xml"
	"fmt"
	"io"
	"strings"
)

type colour struct{ fill, line string }

var colours = map[Kind]colour{
	Export:   {"#d9ead3", "#6aa84f"},
	Job:      {"#fff2cc", "#d6a100"},
	Root:     {"#eeeeee", "#888888"},
	Format:   {"#dae8fc", "#5b7fb5"},
	Protocol: {"#f5e6f7", "#9a6fa8"},
}

// lines are the text of a box: who it is, what it is, its file.
func (n *Node) lines() []string {
	head := strings.TrimSpace(n.Label + " " + n.Name)
	if head == "" {
		head = string(n.Kind)
	}
	l := []string{shorten(head, maxChars)}
	line := ""
	for _, t := range n.Traits {
		switch {
		case line == "":
			line = t
		case len(line)+2+len(t) > maxChars:
			l = append(l, shorten(line, maxChars))
			line = t
		default:
			line += ", " + t
		}
	}
	if line != "" {
		l = append(l, shorten(line, maxChars))
	}
	if n.File != "" {
		l = append(l, shorten(n.File, maxChars))
	}
	return l
}

// SVG draws the graph.
func SVG(w io.Writer, g *Graph) error {
	l := Lay(g)
	var b strings.Builder
	width, height := max(l.Width, 2*margin), max(l.Height, 2*margin)
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%.0f" height="%.0f" viewBox="0 0 %[1]g %[2]g" `+
		`font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="12">`+"\n", width, height)
	b.WriteString(`<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">` +
		`<path d="M0,0 L8,4 L0,8 z" fill="#555555"/></marker></defs>` + "\n" +
		`<rect width="100%" height="100%" fill="#ffffff"/>` + "\n")
	for i := range l.Routes {
		l.Routes[i].write(&b)
	}
	for i := range g.Nodes {
		g.Nodes[i].write(&b, l.Boxes[i])
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *Route) write(b *strings.Builder) {
	p := r.Points
	fmt.Fprintf(b, `<g><title>%s</title><path fill="none" stroke="#555555" marker-end="url(#tip)" d="M%g,%g`,
		escape(strings.TrimSpace(r.Edge.Name+"\n"+r.Edge.Tip)), p[0].X, p[0].Y)
	for i := 1; i < len(p); i++ {
		if i%2 == 1 {
			fmt.Fprintf(b, " L%g,%g", p[i].X, p[i].Y)
			continue
		}
		mid := (p[i-1].Y + p[i].Y) / 2
		fmt.Fprintf(b, " C%g,%g %g,%g %g,%g", p[i-1].X, mid, p[i].X, mid, p[i].X, p[i].Y)
	}
	fmt.Fprintf(b, `"/><text x="%g" y="%g" font-size="10" fill="#555555" stroke="#ffffff" stroke-width="3" paint-order="stroke">%s</text></g>`+"\n",
		r.Label.X, r.Label.Y, escape(r.Edge.Name))
}

func (n *Node) write(b *strings.Builder, box Box) {
	c := colours[n.Kind]
	fmt.Fprintf(b, `<g><title>%s</title><rect x="%g" y="%g" width="%g" height="%g" rx="6" fill="%s" stroke="%s"/>`,
		escape(strings.TrimSpace(n.Name+"\n"+n.Tip)), box.X, box.Y, box.W, box.H, c.fill, c.line)
	for i, s := range n.lines() {
		weight := ""
		if i == 0 {
			weight = ` font-weight="bold"`
		}
		fmt.Fprintf(b, `<text x="%g" y="%g" text-anchor="middle"%s>%s</text>`,
			box.X+box.W/2, box.Y+padding+10+float64(i)*lineHeight, weight, escape(s))
	}
	b.WriteString("</g>\n")
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes all
	return b.String()
}
