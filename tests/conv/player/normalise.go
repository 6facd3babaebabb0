package player

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
)

// normaliser replaces what differs from run to run, and applies the rules of a conversation.
type normaliser struct {
	root, prog string
	auto       map[string]string // generated node names, in order of appearance

	masks, sorts []path
	keeps        []keepRule
	drops        []dropRule
	subs         []subRule
}

type keepRule struct {
	path  path
	names []string
}

type dropRule struct {
	path       path
	key, value string
}

type subRule struct {
	rx *regexp.Regexp
	to string
}

var (
	autoName  = regexp.MustCompile(`#block[0-9]+`)
	timeKey   = regexp.MustCompile(`(_total_time_ns|^idle_time_ns)$`)
	hostKeys  = []string{"actual-size", "date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec", "icount", "thread-id", "pid"}
	ioSpeed   = regexp.MustCompile(`(?m)( ops); \S+ sec \(.*\)$`)
	pyGroup   = regexp.MustCompile(`\\([0-9])`)
	substName = regexp.MustCompile(`\$\{([A-Za-z:0-9]+)\}`)
)

func newNormaliser(root, prog string) *normaliser {
	return &normaliser{root: root, prog: filepath.Base(prog), auto: map[string]string{}}
}

func (n *normaliser) plain() {
	n.masks, n.sorts, n.keeps, n.drops, n.subs = nil, nil, nil, nil, nil
}

func (n *normaliser) text(s string) string {
	s = strings.ReplaceAll(s, n.root, "${DIR}")
	s = autoName.ReplaceAllStringFunc(s, func(name string) string {
		if _, ok := n.auto[name]; !ok {
			n.auto[name] = fmt.Sprintf("#block:%d", len(n.auto))
		}
		return n.auto[name]
	})
	for _, r := range n.subs {
		s = r.rx.ReplaceAllString(s, r.to)
	}
	if rest, ok := strings.CutPrefix(s, "json:"); ok && strings.HasPrefix(rest, "{") {
		if v, err := parse([]byte(rest)); err == nil {
			s = "json:" + canon(v)
		}
	}
	return s
}

// console normalises what a program printed.
func (n *normaliser) console(s string) string {
	name := regexp.QuoteMeta(n.prog)
	s = regexp.MustCompile(`(?m)^(\S*/)?`+name+`([:, ]|$)`).ReplaceAllString(s, "PROG$2")
	s = strings.ReplaceAll(s, "Usage: "+n.prog+" ", "Usage: PROG ")
	return n.text(ioSpeed.ReplaceAllString(s, "$1"))
}

func (n *normaliser) value(v any, key string) any {
	switch v := v.(type) {
	case map[string]any:
		out := make(map[string]any, len(v))
		for _, k := range slices.Sorted(maps.Keys(v)) {
			out[n.text(k)] = n.value(v[k], k)
		}
		return out
	case []any:
		return mapList(v, func(x any) any { return n.value(x, "") })
	case string:
		return n.text(v)
	case json.Number:
		if _, err := v.Int64(); err == nil && (slices.Contains(hostKeys, key) || timeKey.MatchString(key)) {
			return "N"
		}
	}
	return v
}

// message normalises one reply, event or greeting.
func (n *normaliser) message(m any) any {
	m = n.value(m, "")
	if d, ok := m.(map[string]any); ok {
		if ts, ok := d["timestamp"].(map[string]any); ok && len(ts) == 2 && ts["seconds"] != nil && ts["microseconds"] != nil {
			d["timestamp"] = "TS"
		}
		version(d["QMP"])
		version(d["return"])
	}
	for _, r := range n.drops {
		m = walk(m, r.path, func(v any) any { return drop(v, r) })
	}
	for _, p := range n.masks {
		m = walk(m, p, func(any) any { return "~" })
	}
	for _, r := range n.keeps {
		m = walk(m, r.path, func(v any) any { return keep(v, r.names) })
	}
	for _, p := range n.sorts {
		m = walk(m, p, sorted)
	}
	return m
}

func version(holder any) {
	d, ok := holder.(map[string]any)
	if !ok {
		return
	}
	if v, ok := d["version"].(map[string]any); ok {
		d = v
	}
	q, ok := d["qemu"].(map[string]any)
	if !ok || d["package"] == nil {
		return
	}
	for _, k := range []string{"major", "minor", "micro"} {
		q[k] = "N"
	}
	d["package"] = "PKG"
}

func drop(v any, r dropRule) any {
	list, ok := v.([]any)
	if !ok {
		return v
	}
	return slices.DeleteFunc(slices.Clone(list), func(x any) bool {
		d, ok := x.(map[string]any)
		return ok && d[r.key] == r.value
	})
}

func keep(v any, names []string) any {
	d, ok := v.(map[string]any)
	if !ok {
		return v
	}
	d = maps.Clone(d)
	maps.DeleteFunc(d, func(k string, _ any) bool { return !slices.Contains(names, k) })
	return d
}

func sorted(v any) any {
	list, ok := v.([]any)
	if !ok {
		return v
	}
	return slices.SortedStableFunc(slices.Values(list), func(a, b any) int { return strings.Compare(canon(a), canon(b)) })
}

// path is a dotted path: names, "[]" every element, "*" every key, "**" any depth.
type path []string

func parsePath(s string) (p path) {
	for _, part := range strings.Split(strings.TrimSpace(s), ".") {
		name, list := strings.CutSuffix(part, "[]")
		if name != "" {
			p = append(p, name)
		}
		if list {
			p = append(p, "[]")
		}
	}
	return p
}

// walk applies f to whatever the path names.
func walk(v any, p path, f func(any) any) any {
	if len(p) == 0 {
		return f(v)
	}
	head, rest := p[0], p[1:]
	if head == "**" {
		v = walk(v, rest, f)
		switch x := v.(type) {
		case map[string]any:
			return mapValues(x, func(y any) any { return walk(y, p, f) })
		case []any:
			return mapList(x, func(y any) any { return walk(y, p, f) })
		}
		return v
	}
	switch x := v.(type) {
	case []any:
		if head == "[]" {
			return mapList(x, func(y any) any { return walk(y, rest, f) })
		}
	case map[string]any:
		if head == "*" {
			return mapValues(x, func(y any) any { return walk(y, rest, f) })
		}
		if y, ok := x[head]; ok {
			x = maps.Clone(x)
			x[head] = walk(y, rest, f)
			return x
		}
	}
	return v
}

func mapList(in []any, f func(any) any) []any {
	out := make([]any, len(in))
	for i := range in {
		out[i] = f(in[i])
	}
	return out
}

func mapValues(in map[string]any, f func(any) any) map[string]any {
	out := make(map[string]any, len(in))
	for k, v := range in {
		out[k] = f(v)
	}
	return out
}

func parse(b []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, err
	}
	if d.More() {
		return nil, fmt.Errorf("more than one value")
	}
	return v, nil
}

// canon prints a value in the form of the goldens: sorted keys, ASCII.
func canon(v any) string {
	var b strings.Builder
	print(&b, v)
	return b.String()
}

func print(b *strings.Builder, v any) {
	switch v := v.(type) {
	case map[string]any:
		b.WriteByte('{')
		for i, k := range slices.Sorted(maps.Keys(v)) {
			if i > 0 {
				b.WriteString(", ")
			}
			printString(b, k)
			b.WriteString(": ")
			print(b, v[k])
		}
		b.WriteByte('}')
	case []any:
		b.WriteByte('[')
		for i, x := range v {
			if i > 0 {
				b.WriteString(", ")
			}
			print(b, x)
		}
		b.WriteByte(']')
	case string:
		printString(b, v)
	case json.Number:
		b.WriteString(number(v))
	case nil:
		b.WriteString("null")
	default:
		fmt.Fprint(b, v)
	}
}

// number prints integers as they are and everything else in the shortest form that reads back
// equal.
func number(n json.Number) string {
	s := n.String()
	if !strings.ContainsAny(s, ".eE") {
		return s
	}
	f, err := n.Float64()
	if err != nil {
		return s
	}
	s = strconv.FormatFloat(f, 'f', -1, 64)
	if a := math.Abs(f); a != 0 && (a < 1e-4 || a >= 1e16) {
		s = strconv.FormatFloat(f, 'e', -1, 64)
	}
	if !strings.ContainsAny(s, ".e") {
		s += ".0"
	}
	return s
}

var escapes = strings.NewReplacer(`"`, `\"`, `\`, `\\`, "\n", `\n`, "\r", `\r`, "\t", `\t`, "\b", `\b`, "\f", `\f`)

func printString(b *strings.Builder, s string) {
	b.WriteByte('"')
	for _, r := range escapes.Replace(s) {
		switch {
		case r >= 0x10000:
			hi, lo := utf16.EncodeRune(r)
			fmt.Fprintf(b, `\u%04x\u%04x`, hi, lo)
		case r < 0x20 || r > 0x7e:
			fmt.Fprintf(b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
}
