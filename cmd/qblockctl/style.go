package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"qblockd/schema/value"
)

// style is how text looks on an output: with colours on a terminal, unless NO_COLOR is set.
type style struct{ colour bool }

func styleOf(w io.Writer) style {
	return style{isTerminal(w) && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

// isTerminal tells whether v, a file, is a terminal.
func isTerminal(v any) bool {
	f, ok := v.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

func (s style) in(code, text string) string {
	if !s.colour || text == "" {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func (s style) bold(text string) string { return s.in("1", text) }
func (s style) dim(text string) string  { return s.in("2", text) }
func (s style) red(text string) string  { return s.in("31", text) }
func (s style) cyan(text string) string { return s.in("36", text) }

// event shows an event for reading: local time, name, data as dotted KEY=VALUE.
func (s style) event(m *message) string {
	at := time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)
	name := s.cyan(m.Event)
	var data []string
	if v, err := value.Parse(string(m.Data)); err == nil && len(m.Data) > 0 {
		data = flatten(nil, "", v)
	}
	if strings.Contains(m.Event, "ERROR") || strings.Contains(m.Event, "CORRUPTED") || strings.Contains(string(m.Data), `"error"`) {
		name = s.red(m.Event)
	}
	return strings.TrimRight(s.dim(at.Format("15:04:05.000000"))+" "+name+" "+strings.Join(data, " "), " ")
}

// flatten appends what v holds as dotted KEY=VALUE words, in the order of its members.
func flatten(words []string, key string, v value.Value) []string {
	switch v := v.(type) {
	case *value.Dict:
		for _, m := range v.Members() {
			words = flatten(words, strings.TrimPrefix(key+"."+m.Name, "."), m.Value)
		}
		return words
	case value.List:
		for i, e := range v {
			words = flatten(words, strings.TrimPrefix(fmt.Sprintf("%s.%d", key, i), "."), e)
		}
		return words
	case string:
		if v != "" && !strings.ContainsAny(v, " \"'=") && printable(v) == v {
			return append(words, key+"="+v)
		}
	}
	return append(words, key+"="+string(value.Append(nil, v)))
}

// printable replaces what a terminal would take for more than text: names of files may hold
// anything.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == utf8.RuneError {
			return '?'
		}
		return r
	}, s)
}

// size shows a number of bytes: 512 B, 64 KiB, 1.5 GiB.
func size(n int64) string {
	const units = "KMGTPE"
	if n > -1024 && n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, u := float64(n)/1024, 0
	for ; f >= 1023.95 && u < len(units)-1; u++ {
		f /= 1024
	}
	text := strings.TrimSuffix(fmt.Sprintf("%.1f", f), ".0")
	return fmt.Sprintf("%s %ciB", text, units[u])
}
