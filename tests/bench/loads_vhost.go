package main

import (
	"os"
	"path/filepath"
)

var vhostLoads = []nbdLoad{
	{"randread 4 KiB qd1", workload{bs: 4096, qd: 1, random: true}},
	{"randread 4 KiB qd16", workload{bs: 4096, qd: 16, random: true}},
	{"randread 4 KiB qd64", workload{bs: 4096, qd: 64, random: true}},
	{"randwrite 4 KiB qd1", workload{bs: 4096, qd: 1, random: true, write: true}},
	{"randwrite 4 KiB qd16", workload{bs: 4096, qd: 16, random: true, write: true}},
	{"randwrite 4 KiB qd64", workload{bs: 4096, qd: 64, random: true, write: true}},
	{"read 1 MiB qd8", workload{bs: mib, qd: 8}},
	{"write 1 MiB qd8", workload{bs: mib, qd: 8, write: true}},
}

// vhostGroup is a group whose sides export the images that node makes nodes of, one for each side
// if own. Each has one front end for all rounds, as a guest is one.
func vhostGroup(
	b *bench, name string, image func(side string) (string, error), node func(path string) []string,
) *group {
	up, fronts := map[string]*proc{}, map[string]*vhostConn{}
	g := &group{name: "vhost-user-blk " + name, sides: []string{us, qsd}}
	var paths []string
	g.setUp = func(side string) error {
		path, err := image(side)
		if err != nil {
			return err
		}
		paths = append(paths, path)
		sock := filepath.Join(b.shm, side+".vhost")
		p, err := b.daemon(side, 0, append(node(path), "--export",
			"type=vhost-user-blk,id=e,node-name=n,writable=on,addr.type=unix,addr.path="+sock)...)
		if err != nil {
			return err
		}
		up[side] = p
		fronts[side], err = dialVhost(sock, b.shm)
		return err
	}
	g.down = func() {
		for _, c := range fronts {
			if c != nil {
				c.close()
			}
		}
		b.stopAll()
		for _, p := range paths {
			os.Remove(p)
		}
	}
	for _, l := range vhostLoads {
		l.verify = !l.write
		figure, unit, scale := l.name, "IOPS", 1.0
		if l.bs >= mib {
			unit, scale = "MB/s", float64(l.bs)/1e6
		}
		g.loads = append(g.loads, load{
			name:    l.name,
			metrics: []metric{{figure, unit, false}, {figure + ", CPU a request", "us", true}},
			run: func(side string) ([]float64, error) {
				iops, cost, err := driveVhost(fronts[side], up[side], l.workload, b.secs)
				return []float64{iops * scale, cost}, err
			},
		})
	}
	return g
}

// vhostRawLoads: both daemons on a raw file each.
func vhostRawLoads(b *bench, where string) *group {
	return vhostGroup(b, "raw "+where, func(side string) (string, error) {
		dir, err := b.folder(where)
		if err != nil {
			return "", err
		}
		path := filepath.Join(dir, side+".raw")
		return path, fillRaw(path, b.size)
	}, func(path string) []string { return []string{"--blockdev", "driver=file,node-name=n,filename=" + path} })
}

// vhostQcow2Loads: images whose clusters are all there.
func vhostQcow2Loads(b *bench) *group {
	return vhostGroup(b, "qcow2 allocated", func(side string) (string, error) {
		raw, path := filepath.Join(b.shm, "raw"), filepath.Join(b.shm, side+".qcow2")
		defer os.Remove(raw)
		if err := fillRaw(raw, b.size); err != nil {
			return "", err
		}
		return path, b.qemuImg("convert", "-f", "raw", "-O", "qcow2", "-S", "0", raw, path)
	}, qcow2Node)
}
