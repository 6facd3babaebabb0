package main

import (
	"fmt"
	"os"
	"path/filepath"

	"qblockd/blockdev/nbdwire"
)

// clientLoadList are put on daemons whose disk is on another NBD server: each request goes over two
// sockets.
var clientLoadList = []nbdLoad{
	{"read 1 MiB qd16", workload{bs: mib, qd: 16, conns: 1}},
	{"read 1 MiB qd64", workload{bs: mib, qd: 64, conns: 1}},
	{"write 1 MiB qd16", workload{bs: mib, qd: 16, conns: 1, write: true}},
	{"write 1 MiB qd64", workload{bs: mib, qd: 64, conns: 1, write: true}},
	{"randread 4 KiB qd1", workload{bs: 4096, qd: 1, conns: 1, random: true}},
	{"randread 4 KiB qd16", workload{bs: 4096, qd: 16, conns: 1, random: true}},
	{"randread 4 KiB qd64", workload{bs: 4096, qd: 64, conns: 1, random: true}},
	{"randwrite 4 KiB qd1", workload{bs: 4096, qd: 1, conns: 1, random: true, write: true}},
	{"randwrite 4 KiB qd16", workload{bs: 4096, qd: 16, conns: 1, random: true, write: true}},
	{"randwrite 4 KiB qd64", workload{bs: 4096, qd: 64, conns: 1, random: true, write: true}},
}

// clientLoads: the driver nbd of both daemons, connected to one server. nbdkit serves memory, the
// others a file on tmpfs.
func clientLoads(b *bench, server string) *group {
	var raw string
	var behind *proc
	up := map[string]*proc{}
	g := &group{name: "nbd client of " + server, sides: []string{us, qsd}}
	g.ready = func() (err error) {
		if raw = filepath.Join(b.shm, "raw"); server != nbdkit {
			if err = fillRaw(raw, b.size); err != nil {
				return err
			}
		}
		switch server {
		case nbdkit:
			if behind, err = b.memoryServer(); err == nil {
				err = fillExport(behind.nbd)
			}
		case us:
			behind, err = b.daemon(us, 0, append([]string{
				"--blockdev", "driver=file,node-name=n,locking=off,filename=" + raw,
			}, export...)...)
		default:
			behind, err = b.server(server, raw)
		}
		return err
	}
	g.setUp = func(side string) (err error) {
		up[side], err = b.daemon(side, 0, append([]string{
			"--blockdev", "driver=nbd,node-name=n,export=" + exportName + ",server.type=unix,server.path=" + behind.nbd,
		}, export...)...)
		return err
	}
	g.down = func() { os.Remove(raw) }
	for _, l := range clientLoadList {
		l.verify = !l.write
		g.loads = append(g.loads, l.load(func(side string) (float64, error) {
			return drive(up[side].nbd, l.workload, b.secs)
		}))
	}
	return g
}

// memoryServer starts nbdkit with a disk in memory.
func (b *bench) memoryServer() (*proc, error) {
	return b.launch(nbdkit, "nbd", func(p *proc) []string {
		return []string{nbdkit, "-f", "-U", p.nbd, "memory", fmt.Sprint(b.size)}
	})
}

// fillExport writes what loads expect to read to all of an export.
func fillExport(path string) error {
	c, err := dialNBD(path)
	if err != nil {
		return err
	}
	defer c.close()
	data := pattern(mib)
	for off := int64(0); off < c.size; off += mib {
		mark(data, off)
		c.out = appendRequest(c.out, nbdwire.CmdWrite, 0, off, mib)
		if err := c.sendLarge(data); err != nil {
			return err
		}
		if _, err := c.reply(&workload{write: true}, []int64{off}); err != nil {
			return err
		}
	}
	return nil
}
