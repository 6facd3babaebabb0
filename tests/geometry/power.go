package geometry

import (
	"fmt"
	"sync"

	"qblockd/blockdev/drivertest"
	"qblockd/schema/types"
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
func (w *world) afterKill(want []byte) error {
	v := newWorld(w.ctx, w.Sample, "")
	for name, m := range w.power.files {
		v.x.Store.Put(name, m)
	}
	v.target = w.target
	err := v.sound(true)
	if err == nil {
		if err = v.x.Nodes.Add(v.ctx, v.options("l0", w.Layers[0], nil)); err == nil {
			err = v.shows("l0", want)
		}
	}
	if e := v.x.Close(); err == nil {
		err = e
	}
	if err != nil {
		return fmt.Errorf("killed at write %d: %w", w.Kill, err)
	}
	return nil
}

// names are those of the files.
func (w *world) names() (l []string) {
	for i := range w.Layers {
		l = append(l, fmt.Sprintf("l%d", i))
	}
	if w.target != nil {
		l = append(l, "t")
	}
	return l
}

// sound checks all images.
func (w *world) sound(leaky bool) error {
	for _, name := range w.names() {
		if w.format(name) == types.BlockdevDriverRaw {
			continue
		}
		res, err := w.x.Check(w.ctx, name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if res.Corruptions+res.Errors > 0 || res.Leaks > 0 && !leaky {
			return fmt.Errorf("%s: %+v", name, *res)
		}
	}
	return nil
}
