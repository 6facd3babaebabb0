package hostile

import (
	"fmt"
	"slices"
)

// top is the node that is exported.
func (r *run) top() string {
	if r.now != "" {
		return r.now
	}
	return r.nodes[len(r.nodes)-1]
}

// hides tells whether the image may have data behind the end of its disk.
func (r *run) hides() bool {
	return slices.ContainsFunc(r.c.Damages, func(d *Damage) bool { return d.Field == "size" })
}

func (r *run) resize() error {
	cs := r.c.Base.cs()
	sizes := []int64{r.size + cs, r.size + 512, r.size * 2, r.size - cs, r.size - 512, r.size / 2, 0, 512, r.c.Base.Size, 1 << 30, 1 << 40, 1 << 56, 1 << 61}
	to := max(0, sizes[r.r.IntN(len(sizes))]) &^ 511
	if r.below != nil {
		return nil // an overlay goes with its export
	}
	// An export keeps the size as it is.
	if err := r.unexport(); err != nil {
		return err
	}
	ok, err := r.try("block_resize", args{"node-name": r.top(), "size": to})
	if err == nil {
		err = r.export(true)
	}
	if err != nil {
		return err
	}
	if !ok {
		r.m.forget(min(to, r.size), 1<<62)
		return nil
	}
	if to < r.size {
		r.m.forget(to, 1<<62)
	}
	for s := r.size / sector; !r.hides() && to > r.size && s < min(to/sector, r.size/sector+4096); s++ {
		r.m.may[s] = []uint64{r.m.zero}
		r.m.written[s], r.m.touched[s] = true, true
	}
	r.size = to
	return nil
}

func (r *run) snapshot() error {
	r.names++
	name := fmt.Sprintf("n%d", r.names)
	_, err := r.try("blockdev-snapshot-internal-sync", args{"device": r.top(), "name": name})
	return err
}

func (r *run) deleteSnapshot() error {
	names := []string{"snap0", "snap1", "n1", "n2"}
	_, err := r.try("blockdev-snapshot-delete-internal-sync", args{"device": r.top(), "name": names[r.r.IntN(len(names))]})
	return err
}

func (r *run) bitmap() error {
	names := append([]string{"b0", "b1", "b2"}, r.bitmaps...)
	name := names[r.r.IntN(len(names))]
	node := r.top()
	var err error
	switch r.r.IntN(6) {
	case 0, 1:
		r.names++
		name = fmt.Sprintf("m%d", r.names)
		a := args{"node": node, "name": name, "persistent": r.r.IntN(3) > 0}
		if r.r.IntN(2) == 0 {
			a["granularity"] = 512 << r.r.IntN(12)
		}
		r.bitmaps = append(r.bitmaps, name)
		_, err = r.try("block-dirty-bitmap-add", a)
	case 2:
		_, err = r.try("block-dirty-bitmap-remove", args{"node": node, "name": name})
	case 3:
		_, err = r.try("block-dirty-bitmap-clear", args{"node": node, "name": name})
	case 4:
		_, err = r.try("block-dirty-bitmap-merge", args{"node": node, "target": name, "bitmaps": []string{names[r.r.IntN(len(names))]}})
	case 5:
		c := []string{"block-dirty-bitmap-disable", "block-dirty-bitmap-enable", "x-debug-block-dirty-bitmap-sha256"}
		_, err = r.try(c[r.r.IntN(len(c))], args{"node": node, "name": name})
	}
	return err
}
