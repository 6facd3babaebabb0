package sockets

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// quietFor is how long nothing more is logged.
const quietFor = 10 * time.Second

// Seldom logs what others can bring about as often as they like: once in ten seconds, with how
// often it has happened since. The zero value is ready.
type Seldom struct {
	mu     sync.Mutex
	last   time.Time // +checklocks:mu
	missed int       // +checklocks:mu
}

// Log writes a line, unless there was one a short while ago. counted is the name under which a line
// tells how many were left out before it.
func (s *Seldom) Log(log *slog.Logger, level slog.Level, text, counted string, attrs ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if !s.last.IsZero() && now.Sub(s.last) < quietFor {
		s.missed++
		return
	}
	if s.missed > 0 {
		attrs = append(attrs, counted, s.missed)
	}
	log.Log(context.Background(), level, text, attrs...)
	s.last, s.missed = now, 0
}
