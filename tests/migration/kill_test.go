package migration

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestSourceKilled kills the source in the middle of a migration: its image has all that was
// flushed, whatever the target has got, and can be moved again to the same target.
func TestSourceKilled(t *testing.T) {
	rounds(t, (*flagRounds+1)/2, func(m *migration, pivot bool) {
		m.kill(m.r.Int64N(diskSize / 2))
		m.restart()
		m.move(pivot, []cut{randomCut(m.r, diskSize/2)})
		m.goOn()
	})
}

// kill ends the source by SIGKILL when so many bytes have passed.
func (m *migration) kill(at int64) {
	var cuts []cut
	if at > 1<<20 {
		cuts = append(cuts, randomCut(m.r, at))
	}
	m.wire.cutAt(cuts...)
	m.guests.begin()
	m.mirror()
	for end := time.Now().Add(patience); m.wire.carried() < at; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("%d bytes have passed", m.wire.carried())
		}
	}
	m.source.Kill()
	if m.guests.end() == nil {
		m.t.Error("the guests noticed nothing")
	}
	check(m.t, filepath.Join(m.dirs[0], "disk"))
}

// restart starts the source again; the guests find what they had written and flushed.
func (m *migration) restart() {
	for _, path := range []string{m.source.Pidfile(), m.source.QMPSocket(), m.source.NBDSocket()} {
		_ = os.Remove(path) // a killed daemon leaves them behind
	}
	m.startSource()
	m.must(m.guests.connect(m.source.NBDSocket(), "disk"))
	m.must(m.guests.each((*guest).recover))
}
