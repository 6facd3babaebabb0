package sockets

import (
	"log/slog"
	"time"
)

// Pauses of one who cannot accept connections.
const (
	firstPause = 50 * time.Millisecond
	lastPause  = time.Second
)

// Trouble keeps one who accepts connections, and cannot, from trying all the time and from filling
// the log: out of descriptors or memory passes, but may take a while. The zero value is ready; one
// goroutine uses it.
type Trouble struct {
	pause  time.Duration
	seldom Seldom
}

// Failed logs an error of accepting, unless there was one a short while ago, and tells how long to
// wait.
func (t *Trouble) Failed(log *slog.Logger, text string, err error, attrs ...any) time.Duration {
	t.seldom.Log(log, slog.LevelWarn, text, "failures-before", append(attrs, "error", err)...)
	t.pause = min(max(2*t.pause, firstPause), lastPause)
	return t.pause
}

// Over is called when a connection was accepted: the next trouble begins with a short pause.
func (t *Trouble) Over() { t.pause = 0 }
