package main

import (
	"context"
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

func newLogHandler(w io.Writer, terminal bool, level slog.Level) slog.Handler {
	if terminal {
		return terminalHandler{tint.NewTextHandler(w, &tint.Options{Level: level, TimeFormat: time.TimeOnly})}
	}
	return slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level})
}

// terminalHandler is a handler for terminals: names in records, which come from clients, images and
// peers, cannot make it do anything. Each record is one line.
type terminalHandler struct{ slog.Handler }

// Handle implements slog.Handler.
func (h terminalHandler) Handle(ctx context.Context, r slog.Record) error {
	own := slog.NewRecord(r.Time, r.Level, printable(r.Message), r.PC)
	r.Attrs(func(a slog.Attr) bool {
		own.AddAttrs(printableAttr(a))
		return true
	})
	return h.Handler.Handle(ctx, own)
}

// WithAttrs implements slog.Handler.
func (h terminalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	own := make([]slog.Attr, len(attrs))
	for i, a := range attrs {
		own[i] = printableAttr(a)
	}
	return terminalHandler{h.Handler.WithAttrs(own)}
}

// WithGroup implements slog.Handler.
func (h terminalHandler) WithGroup(name string) slog.Handler {
	return terminalHandler{h.Handler.WithGroup(printable(name))}
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
