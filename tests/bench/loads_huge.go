package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"qblockd/blockdev/nbdwire"
)

const tib = int64(1) << 40

// touch writes 4 KiB at each of offs.
func touch(path string, offs ...int64) error {
	c, err := dialNBD(path)
	if err != nil {
		return err
	}
	defer c.close()
	for _, off := range offs {
		c.out = append(appendRequest(c.out, nbdwire.CmdWrite, 0, off, markPage), pattern(markPage)...)
		if _, err := c.reply(&workload{write: true, bs: markPage}, []int64{off}); err != nil {
			return err
		}
	}
	c.out = appendRequest(c.out, nbdwire.CmdDisc, 0, 0, 0)
	return c.flush()
}

// bitmapLoads: a disk of 1 TiB that is written to all over, with a bitmap of 64 KiB.
func bitmapLoads(b *bench) *group {
	g := &group{name: "bitmap of 1 TiB", sides: daemons}
	up, grown := map[string]*proc{}, map[string]float64{}
	g.setUp = func(side string) error {
		p, err := b.daemon(side, 0, "--blockdev", fmt.Sprintf("driver=null-co,node-name=n,size=%d", tib),
			"--export", "type=nbd,id=e,node-name=n,name="+exportName+",writable=on")
		if err != nil {
			return err
		}
		up[side] = p
		w := workload{bs: markPage, qd: 32, conns: 1, random: true, write: true}
		if _, err := drive(p.nbd, w, 1); err != nil { // what requests take is not the bitmap's
			return err
		}
		before, err := p.settled()
		if err != nil {
			return err
		}
		for _, name := range []string{"a", "b"} {
			if _, err := p.q.do("block-dirty-bitmap-add", object{"node": "n", "name": name, "granularity": 64 << 10, "disabled": name == "b"}); err != nil {
				return err
			}
		}
		if _, err := drive(p.nbd, w, max(2, b.secs)); err != nil {
			return err
		}
		after, err := p.settled()
		grown[side] = (after - before) / 1024
		return err
	}
	timed := func(side, command string, args object) (float64, error) {
		begin := time.Now()
		_, err := up[side].q.do(command, args)
		return time.Since(begin).Seconds() * 1e3, err
	}
	merge := object{"node": "n", "target": "b", "bitmaps": []string{"a"}}
	g.loads = []load{
		known("RSS", "MiB", grown),
		{name: "merge", metrics: []metric{{"merge into an empty one", "ms", true}, {"merge again", "ms", true}, {"clear", "ms", true}},
			run: func(side string) ([]float64, error) {
				first, err1 := timed(side, "block-dirty-bitmap-merge", merge)
				again, err2 := timed(side, "block-dirty-bitmap-merge", merge)
				clear, err3 := timed(side, "block-dirty-bitmap-clear", object{"node": "n", "name": "b"})
				return []float64{first, again, clear}, errors.Join(err1, err2, err3)
			}},
	}
	return g
}

// hugeLoads: jobs on a disk of 64 TiB with hardly anything in it.
func hugeLoads(b *bench, cluster string) *group {
	g := &group{name: "64 TiB in clusters of " + cluster, sides: daemons}
	size := 64 * tib
	images := map[string]string{}
	g.ready = func() error {
		for _, name := range []string{"n", "t"} {
			images[name] = filepath.Join(b.shm, "huge-"+name)
			opts := "cluster_size=" + map[string]string{"64 KiB": "65536", "2 MiB": "2097152"}[cluster]
			if err := b.qemuImg("create", "-q", "-f", "qcow2", "-o", opts, images[name], fmt.Sprint(size)); err != nil {
				return err
			}
		}
		return nil
	}
	g.down = func() {
		for _, path := range images {
			os.Remove(path)
		}
	}
	var rounds atomic.Int64
	metrics := []metric{{"bitmap backup of two clusters", "ms", true}, {"RSS at its end", "MiB", true}}
	g.loads = []load{{name: "bitmap backup", pairs: 3, metrics: metrics,
		run: func(side string) ([]float64, error) {
			args := append(qcow2Node(images["n"]), "--blockdev", "driver=file,node-name=tf,filename="+images["t"],
				"--blockdev", "driver=qcow2,node-name=t,file=tf")
			p, err := b.daemon(side, 0, append(args, export...)...)
			if err != nil {
				return nil, err
			}
			defer b.stop(p)
			if _, err := p.q.do("block-dirty-bitmap-add", object{"node": "n", "name": "b"}); err != nil {
				return nil, err
			}
			if err := touch(p.nbd, rounds.Add(1)<<20, size-tib); err != nil {
				return nil, err
			}
			took, err := p.job("blockdev-backup", object{"device": "n", "target": "t", "sync": "bitmap", "bitmap": "b", "bitmap-mode": "on-success"})
			if err != nil {
				return nil, err
			}
			kib, err := p.rss()
			return []float64{took.Seconds() * 1e3, kib / 1024}, err
		}}}
	return g
}
