package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// mirrorLoads: a raw image copied to a server by a mirror, until that is ready. The server is the
// same for both daemons, or a second daemon of the kind.
func mirrorLoads(b *bench) *group {
	source := func() string { return filepath.Join(b.shm, "source") }
	copied := func() string { return filepath.Join(b.shm, "copy") }
	g := &group{name: "mirror to NBD", sides: daemons}
	g.ready = func() error { return fillRaw(source(), b.size) }
	g.down = func() {
		os.Remove(source())
		os.Remove(copied())
	}
	memory := func(more ...string) func(string) (*proc, error) {
		return func(string) (*proc, error) {
			return b.launch(nbdkit, "nbd", func(p *proc) []string {
				return append([]string{nbdkit, "-f", "-U", p.nbd, "memory", fmt.Sprint(b.size)}, more...)
			})
		}
	}
	for _, x := range []struct {
		name   string
		to     func(side string) (*proc, error)
		copied bool // what arrives is in the file
	}{
		{"to nbdkit", memory(), false},
		{"to nbdkit, 5 ms away", memory("--filter=delay", "wdelay=5ms"), false},
		{"to qemu-nbd", func(string) (*proc, error) { return b.server(qemuNBD, copied()) }, true},
		{"to its like", func(side string) (*proc, error) {
			return b.daemon(side, 0, append([]string{"--blockdev", "driver=file,node-name=n,filename=" + copied()}, export...)...)
		}, true},
	} {
		checked := map[string]bool{}
		g.loads = append(g.loads, single(x.name, "MB/s", false, func(side string) (float64, error) {
			took, err := b.mirror(side, source(), copied(), x.to)
			if err == nil && x.copied && !checked[side] {
				checked[side] = true
				err = b.qemuImg("compare", "-q", "-f", "raw", "-F", "raw", source(), copied())
			}
			return float64(b.size) / 1e6 / took.Seconds(), err
		}))
	}
	return g
}

// mirror measures a mirror of source to an empty copy behind a new server.
func (b *bench) mirror(side, source, copied string, to func(side string) (*proc, error)) (time.Duration, error) {
	f, err := os.Create(copied)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := f.Truncate(b.size); err != nil {
		return 0, err
	}
	target, err := to(side)
	if err != nil {
		return 0, err
	}
	defer b.stop(target)
	p, err := b.daemon(side, 0, "--blockdev", "driver=file,node-name=n,filename="+source,
		"--blockdev", "driver=nbd,node-name=t,server.type=unix,server.path="+target.nbd+",export="+exportName)
	if err != nil {
		return 0, err
	}
	defer b.stop(p)
	begin := time.Now()
	if _, err := p.q.do("blockdev-mirror", object{"job-id": "j", "device": "n", "target": "t", "sync": "full"}); err != nil {
		return 0, err
	}
	for {
		jobs, err := p.q.do("query-jobs", nil)
		switch {
		case err != nil:
			return 0, err
		case bytes.Contains(jobs, []byte(`"ready"`)):
			took := time.Since(begin)
			_, err := p.q.do("block-job-cancel", object{"device": "j"})
			return took, err
		case !bytes.Contains(jobs, []byte(`"running"`)) && !bytes.Contains(jobs, []byte(`"created"`)):
			return 0, fmt.Errorf("the mirror is %s", jobs)
		}
		time.Sleep(time.Millisecond)
	}
}
