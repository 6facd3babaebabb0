package main

import (
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/lmittmann/tint"
	"golang.org/x/sys/unix"
)

// setupLog sends structured records to stderr: readable on a terminal, JSON otherwise.
func setupLog(level slog.Level) {
	slog.SetDefault(slog.New(newLogHandler(os.Stderr, isTerminal(os.Stderr), level)))
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// newLogHandler makes the handler of records. On a terminal each record is one line, and names in
// it, which come from clients, images and peers, cannot make the terminal do anything.
func newLogHandler(w io.Writer, terminal bool, level slog.Level) slog.Handler {
	if !terminal {
		return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level})
	}
	return tint.NewTextHandler(w, &tint.Options{
		Level: level, TimeFormat: time.TimeOnly,
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if _, isLevel := a.Value.Any().(slog.Level); isLevel {
				return a // it has a colour
			}
			return printableAttr(a)
		},
	})
}

func printableAttr(a slog.Attr) slog.Attr {
	a.Key, a.Value = printable(a.Key), a.Value.Resolve()
	switch a.Value.Kind() {
	case slog.KindString:
		a.Value = slog.StringValue(printable(a.Value.String()))
	case slog.KindAny:
		a.Value = slog.StringValue(printable(fmt.Sprintf("%+v", a.Value.Any())))
	case slog.KindGroup:
		var own []slog.Attr
		for _, m := range a.Value.Group() {
			own = append(own, printableAttr(m))
		}
		a.Value = slog.GroupValue(own...)
	}
	return a
}

// printable is s with what a terminal would not show as a character written as in Go's strings:
// control characters, also those of 8 bits, what changes the direction of writing, and bytes that
// are no UTF-8.
func printable(s string) string {
	bad := func(r rune) bool { return r == unicode.ReplacementChar || !unicode.IsPrint(r) }
	if strings.IndexFunc(s, bad) < 0 {
		return unlike(s)
	}
	var b strings.Builder
	for len(s) > 0 {
		n := strings.IndexFunc(s, bad)
		if n < 0 {
			n = len(s)
		}
		b.WriteString(s[:n])
		if s = s[n:]; s == "" {
			break
		}
		k := 1
		for k < len(s) && k < 4 && s[k]&0xc0 == 0x80 {
			k++
		}
		q := strconv.QuoteToGraphic(s[:k])
		b.WriteString(q[1 : len(q)-1])
		s = s[k:]
	}
	return unlike(b.String())
}

// unlike writes \x1b another way: where tint quotes a text it takes that for its own colours, and
// makes an escape character of it again.
func unlike(s string) string { return strings.ReplaceAll(s, `\x1b`, `\x1B`) }
