package main

import (
	"errors"
	"log/slog"
	"strings"
	"testing"
)

// Whatever a name in a record holds, it is shown on one line and does nothing to a terminal.
func TestLogOnTerminal(t *testing.T) {
	const name = "a\x1b[2J\\x1b[3J \x1b]0;title\a\r\nb\u009b31m\u202ec\x7f\xff\x00ä%"
	for _, terminal := range []bool{true, false} {
		var b strings.Builder
		log := slog.New(newLogHandler(&b, terminal, slog.LevelInfo)).With("with"+name, name)
		log.Warn("cannot open '"+name+"'", "name"+name, name, "error", errors.New("of "+name), slog.Group("g", "in", name))
		got := b.String()
		if strings.Count(got, "\n") != 1 || !strings.HasSuffix(got, "\n") {
			t.Errorf("terminal %v: not one line: %q", terminal, got)
		}
		if !terminal {
			continue
		}
		// Colours are the handler's own.
		for _, c := range []string{"\x1b[0m", "\x1b[2m", "\x1b[92m", "\x1b[93m", "\x1b[91m", "\x1b[22m", "\x1b[2;91m", "\x1b[22;2m", "\x1b[2;93m"} {
			got = strings.ReplaceAll(got, c, "")
		}
		for _, r := range strings.TrimSuffix(got, "\n") {
			if r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0x202e || r == 0xfffd {
				t.Errorf("%q in %q", r, got)
			}
		}
		if want := `cannot open 'a\x1B[2J\x1B[3J \x1B]0;title\a\r\nb\u009b31m\u202ec\x7f\xff\x00ä%'`; !strings.Contains(got, want) {
			t.Errorf("%s is not in %s", want, got)
		}
	}
}
