package geometry

import (
	"errors"
	"sync"

	"qblockd/blockdev/drivertest"
	"qblockd/tests/trial"
)

// power takes a copy of all files at the at-th change of one: as a killed process leaves them, or
// as a power failure does. The world goes on unharmed.
type power struct {
	at     int
	after  bool // the power fails; else only what is in the process is lost
	seed   uint64
	medium map[string]*drivertest.CrashFile

	mu    sync.Mutex
	n     int
	files map[string]*drivertest.MemFile
}

// hook is entered by each request before it begins: nothing begins while the copy is made.
func (p *power) hook(op drivertest.Op, _, _ int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if op&drivertest.OpModify == 0 {
		return
	}
	if p.n++; p.n != p.at {
		return
	}
	p.files = map[string]*drivertest.MemFile{}
	for name, c := range p.medium {
		if p.after {
			p.files[name] = c.Crash(p.seed)
		} else {
			p.files[name] = c.Kill()
		}
	}
}

// afterKill opens the copies: the images are sound, and the source shows what it showed when the
// job began.
func (w *world) afterKill(want []byte) {
	v := newWorld(w.ctx, w.Sample, "")
	for name, m := range w.power.files {
		v.x.Store.Put(name, m)
	}
	v.target = w.target
	err := trial.Run(func() {
		v.sound(true)
		trial.Must(v.x.Nodes.Add(v.ctx, v.options("l0", w.Layers[0], nil)))
		v.shows("l0", want)
	})
	if err := errors.Join(err, v.x.Close()); err != nil {
		trial.Fail("killed at write %d: %w", w.Kill, err)
	}
}

// sound checks all images.
func (w *world) sound(leaky bool) {
	var names []string
	for i := range w.Layers {
		names = append(names, layer(i))
	}
	if w.target != nil {
		names = append(names, "t")
	}
	for _, name := range names {
		if w.layer(name).Raw {
			continue
		}
		trial.In(name, func() {
			res := trial.Get(w.x.Check(w.ctx, name))
			if res.Corruptions+res.Errors > 0 || res.Leaks > 0 && !leaky {
				trial.Fail("%+v", *res)
			}
		})
	}
}
