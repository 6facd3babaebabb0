package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

var allSides = []string{us, qsd, nbdkit, qemuNBD}

// nbdLoad is a workload with its name.
type nbdLoad struct {
	name string
	workload
}

const mib = 1 << 20

var nbdLoads = []nbdLoad{
	{"read 1 MiB qd8", workload{bs: mib, qd: 8, conns: 1}},
	{"read 1 MiB qd8 x4", workload{bs: mib, qd: 8, conns: 4}},
	{"write 1 MiB qd8", workload{bs: mib, qd: 8, conns: 1, write: true}},
	{"randread 4 KiB qd1", workload{bs: 4096, qd: 1, conns: 1, random: true}},
	{"randread 4 KiB qd16", workload{bs: 4096, qd: 16, conns: 1, random: true}},
	{"randread 4 KiB qd64 x4", workload{bs: 4096, qd: 64, conns: 4, random: true}},
	{"randwrite 4 KiB qd16", workload{bs: 4096, qd: 16, conns: 1, random: true, write: true}},
}

// load measures bandwidth of large requests, and the number of small ones.
func (l nbdLoad) load(run func(side string) (iops float64, err error)) load {
	if l.bs < 64<<10 {
		return single(l.name, "IOPS", false, run)
	}
	return single(l.name, "MB/s", false, func(side string) (float64, error) {
		iops, err := run(side)
		return iops * float64(l.bs) / 1e6, err
	})
}

// nbdLoadsOn are all workloads on servers that run; data read are compared.
func nbdLoadsOn(b *bench, up map[string]*proc) (loads []load) {
	for _, l := range nbdLoads {
		l.verify = !l.write
		loads = append(loads, l.load(func(side string) (float64, error) { return drive(up[side].nbd, l.workload, b.secs) }))
	}
	return loads
}

// export is the options for the export of node n.
var export = []string{"--export", "type=nbd,id=e,node-name=n,writable=on,name=" + exportName}

// rawLoads: all four servers on one file, without locks.
func rawLoads(b *bench, where string) *group {
	var path string
	up := map[string]*proc{}
	g := &group{name: "nbd raw " + where, sides: allSides}
	g.ready = func() error {
		dir, err := b.folder(where)
		if err != nil {
			return err
		}
		path = filepath.Join(dir, "raw")
		return fillRaw(path, b.size)
	}
	g.setUp = func(side string) (err error) {
		if side == us || side == qsd {
			up[side], err = b.daemon(side, 0, append([]string{"--blockdev", "driver=file,node-name=n,locking=off,filename=" + path}, export...)...)
		} else {
			up[side], err = b.server(side, path)
		}
		return err
	}
	g.down = func() { os.Remove(path) }
	g.loads = nbdLoadsOn(b, up)
	return g
}

// qcow2Loads: images whose clusters are all there, one for each daemon.
func qcow2Loads(b *bench) *group {
	raw := func() string { return filepath.Join(b.shm, "raw") }
	image := func(side string) string { return filepath.Join(b.shm, side+".qcow2") }
	up := map[string]*proc{}
	g := &group{name: "nbd qcow2 allocated", sides: []string{us, qsd}}
	g.ready = func() error { return fillRaw(raw(), b.size) }
	g.setUp = func(side string) error {
		err := b.qemuImg("convert", "-f", "raw", "-O", "qcow2", "-S", "0", raw(), image(side))
		if err == nil {
			up[side], err = b.daemon(side, 0, append(qcow2Node(image(side)), export...)...)
		}
		return err
	}
	g.down = func() {
		b.stopAll()
		for side := range up {
			if err := b.qemuImg("check", "-q", image(side)); err != nil {
				b.fail(g.name+": "+side, err)
			}
			os.Remove(image(side))
		}
		os.Remove(raw())
	}
	g.loads = nbdLoadsOn(b, up)
	return g
}

// luksLoads: an encrypted image, AES-256-XTS, for each daemon: luks, or qcow2 with the same inside.
func luksLoads(b *bench, format string) *group {
	raw := func() string { return filepath.Join(b.shm, "raw") }
	image := func(side string) string { return filepath.Join(b.shm, side+"."+format) }
	const secret = "secret,id=k,data=bench"
	name, key, options := "nbd luks", "key-secret=k", "key-secret=k,iter-time=10"
	if format == "qcow2" {
		name, key = "nbd encrypted qcow2", "encrypt.format=luks,encrypt.key-secret=k"
		options = key + ",encrypt.iter-time=10"
	}
	up := map[string]*proc{}
	g := &group{name: name, sides: []string{us, qsd}}
	g.ready = func() error { return fillRaw(raw(), b.size) }
	g.setUp = func(side string) (err error) {
		for range 20 { // QEMU's measure of processor time is too coarse for it now and then
			err = b.qemuImg("convert", "--object", secret, "-f", "raw", "-O", format, "-o", options, raw(), image(side))
			if err == nil || !strings.Contains(err.Error(), "accurate CPU usage") {
				break
			}
		}
		if err != nil {
			return err
		}
		up[side], err = b.daemon(side, 0, append([]string{
			"--object", secret, "--blockdev", "driver=file,node-name=f,filename=" + image(side),
			"--blockdev", "driver=" + format + ",node-name=n,file=f," + key,
		}, export...)...)
		return err
	}
	g.down = func() {
		for side := range up {
			os.Remove(image(side))
		}
		os.Remove(raw())
	}
	g.loads = nbdLoadsOn(b, up)
	return g
}

func qcow2Node(path string) []string {
	return []string{"--blockdev", "driver=file,node-name=f,filename=" + path, "--blockdev", "driver=qcow2,node-name=n,file=f"}
}

// fresh runs l on side with a new and empty qcow2 image, on top of more.
func (b *bench) fresh(side string, l *nbdLoad, size int64, more ...string) (float64, error) {
	path := filepath.Join(b.shm, "fresh.qcow2")
	defer os.Remove(path)
	if err := b.newQcow2(path, size); err != nil {
		return 0, err
	}
	node := qcow2Node(path)
	if len(more) > 0 {
		node[3] += ",backing=base"
	}
	args := slices.Concat(more, node, export)
	p, err := b.daemon(side, 0, args...)
	if err != nil {
		return 0, err
	}
	n, err := drive(p.nbd, l.workload, b.secs)
	b.stop(p)
	if err == nil {
		err = b.qemuImg("check", "-q", path)
	}
	return n, err
}

// allocatingLoads: every write meets clusters that are not there yet, or were not a moment ago.
func allocatingLoads(b *bench) *group {
	g := &group{name: "nbd qcow2 allocating", sides: []string{us, qsd}}
	for _, l := range []nbdLoad{
		{"write 1 MiB qd8", workload{bs: mib, qd: 8, conns: 1, write: true}},
		{"randwrite 4 KiB qd16", workload{bs: 4096, qd: 16, conns: 1, random: true, write: true}},
	} {
		g.loads = append(g.loads, l.load(func(side string) (float64, error) { return b.fresh(side, &l, 4*b.size) }))
	}
	return g
}

// copyOnWriteLoads: each first write to a cluster copies the rest of it from below.
func copyOnWriteLoads(b *bench) *group {
	base := func() string { return filepath.Join(b.shm, "base") }
	g := &group{name: "nbd chain", sides: []string{us, qsd}}
	g.ready = func() error { return fillRaw(base(), b.size) }
	g.down = func() { os.Remove(base()) }
	l := nbdLoad{"randwrite 4 KiB qd16 copying", workload{bs: 4096, qd: 16, conns: 1, random: true, write: true, stride: 64 << 10}}
	r := nbdLoad{"randread 4 KiB qd16 of backing", workload{bs: 4096, qd: 16, conns: 1, random: true, verify: true}}
	for _, l := range []nbdLoad{r, l} {
		g.loads = append(g.loads, l.load(func(side string) (float64, error) {
			return b.fresh(side, &l, b.size, "--blockdev", "driver=file,node-name=base,read-only=on,filename="+base())
		}))
	}
	return g
}

// streamLoads: a raw image streamed into an empty overlay.
func streamLoads(b *bench, where string) *group {
	var base, top string
	g := &group{name: "stream " + where, sides: []string{us, qsd}}
	g.ready = func() error {
		dir, err := b.folder(where)
		if err != nil {
			return err
		}
		base, top = filepath.Join(dir, "base"), filepath.Join(dir, "top.qcow2")
		return fillRaw(base, b.size)
	}
	g.down = func() {
		os.Remove(base)
		os.Remove(top)
	}
	checked := map[string]bool{}
	g.loads = []load{single("block-stream", "MB/s", false, func(side string) (float64, error) {
		if err := b.newQcow2(top, b.size); err != nil {
			return 0, err
		}
		args := append(qcow2Node(top), "--blockdev", "driver=file,node-name=base,read-only=on,filename="+base)
		args[3] += ",backing=base"
		args = append(args[4:], args[:4]...)
		p, err := b.daemon(side, 0, args...)
		if err != nil {
			return 0, err
		}
		took, err := p.job("block-stream", object{"device": "n"})
		b.stop(p)
		if err == nil && !checked[side] {
			checked[side] = true
			if err = b.qemuImg("compare", "-q", "-f", "raw", "-F", "qcow2", base, top); err == nil {
				err = b.qemuImg("check", "-q", top)
			}
		}
		return float64(b.size) / 1e6 / took.Seconds(), err
	})}
	if b.quick {
		g.loads[0].pairs = 3
	}
	return g
}
