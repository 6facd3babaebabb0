package blockdev

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// This file tells the format of a file from its first bytes, where a backing file is named without
// a format, or a client that wants an existing image used names none. What it tells a guest may
// have written: a disk that was raw all along becomes, with the right bytes at its beginning, an
// image whose header names files of the host. So a file that any program would take for an image is
// not taken for raw, and a node that was taken for raw keeps its first sector from looking like
// anything else.

// probeBytes is how much of a file is looked at to guess its format.
const probeBytes = 512

// probe finds out the format of a file by its first bytes and completes the plan.
func (o *opener) probe(p *plan, file *graph.Node) error {
	head, err := o.readHead(file)
	if err != nil {
		return blk.Errnof(err, "Could not read image for determining its format")
	}
	name := o.m.name(file).plain
	if p.drv, err = o.m.guess(head, name); err != nil {
		return err
	}
	if p.drv.Verbatim {
		p.guessed = &driver.Guess{File: name, Verbatim: o.m.isVerbatim}
	}
	*p.opts = types.BlockdevOptions{Driver: p.drv.Name, U: p.drv.FromFile(*p.opts.U.(*types.BlockdevRef))}
	p.kids[0].role = p.drv.Children(p.opts.U)[0].Role
	p.gen.DriverName, p.gen.Kind, p.gen.Canonical = string(p.drv.Name), p.drv.Kind, p.opts
	p.gen.Reopens = p.drv.Reopen != nil
	if p.node != nil {
		p.node.SetFormat(p.gen)
	}
	return nil
}

// guess is the driver of what begins with head, in a file of that name.
func (c *catalog) guess(head []byte, name string) (*driver.Any, error) {
	var found, verbatim *driver.Any
	best := 0
	for _, d := range c.order {
		if d.Verbatim {
			verbatim = d
		}
		if d.Probe == nil {
			continue
		}
		if score := d.Probe(head); score > best {
			best, found = score, d
		}
	}
	if found != nil {
		return found, nil
	}
	if f := foreignFormat(head, name); f != "" {
		return nil, fmt.Errorf("Unknown driver '%s'", f)
	}
	if verbatim == nil {
		return nil, errors.New("Could not determine image format: No compatible driver found")
	}
	return verbatim, nil
}

// isVerbatim tells whether a file that begins with head is taken for no other format.
func (c *catalog) isVerbatim(head []byte) bool {
	d, err := c.guess(head, "")
	return err == nil && d.Verbatim
}

// foreignFormat is the format that QEMU takes a file for that begins with head, if it is
// one without a driver here; "" if not.
func foreignFormat(head []byte, name string) string {
	at := func(off int, magic string) bool {
		return len(head) >= off+len(magic) && string(head[off:off+len(magic)]) == magic
	}
	switch {
	case at(0, "QFI\xfb\x00\x00\x00\x01"):
		return "qcow"
	case at(0, "QED\x00"):
		return "qed"
	case at(0, "KDMV"), at(0, "COWD"), isVMDKText(head):
		return "vmdk"
	case at(0x40, "\x7f\x10\xda\xbe"):
		return "vdi"
	case at(0, "vhdxfile"):
		return "vhdx"
	case at(0, "conectix"):
		return "vpc"
	case (at(0, "WithoutFreeSpace") || at(0, "WithouFreSpacExt")) && at(16, "\x02\x00\x00\x00"):
		return "parallels"
	case at(0, "LUKS\xba\xbe"):
		return "luks"
	case isBochs(head):
		return "bochs"
	case at(0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"):
		return "cloop"
	case strings.HasSuffix(name, ".dmg") && len(name) > len(".dmg"): // told by nothing else
		return "dmg"
	}
	return ""
}

// isVMDKText tells a description of a VMware disk: comments and lines of blanks, then its version.
func isVMDKText(b []byte) bool {
	for len(b) > 0 && (b[0] == '#' || b[0] == ' ') {
		line, rest, _ := bytes.Cut(b, []byte("\n"))
		if b[0] == ' ' && len(bytes.TrimRight(bytes.TrimSuffix(line, []byte("\r")), " ")) > 0 {
			return false
		}
		b = rest
	}
	for _, v := range []string{"1", "2", "3"} {
		if bytes.HasPrefix(b, []byte("version="+v+"\n")) || bytes.HasPrefix(b, []byte("version="+v+"\r\n")) {
			return true
		}
	}
	return false
}

// isBochs tells a growing disk of Bochs.
func isBochs(b []byte) bool {
	text := func(off, n int) string {
		s, _, _ := bytes.Cut(b[off:off+n], []byte{0})
		return string(s)
	}
	if len(b) < 68 || text(0, 32) != "Bochs Virtual HD Image" || text(32, 16) != "Redolog" || text(48, 16) != "Growing" {
		return false
	}
	v := binary.LittleEndian.Uint32(b[64:])
	return v == 0x10000 || v == 0x20000
}

// readHead reads the first bytes of a node, zeroes beyond its end.
func (o *opener) readHead(n *graph.Node) ([]byte, error) {
	head := make([]byte, probeBytes)
	size := min(n.Size(), probeBytes)
	if size == 0 {
		return head, nil
	}
	root, err := o.m.g.AddRoot(o.ctx, reading(o.ctx), n)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err := o.m.g.CloseRoot(context.WithoutCancel(o.ctx), root); err != nil {
			o.m.log.Error("cannot close a root", "error", err)
		}
	}()
	req, err := root.Begin(o.ctx)
	if err != nil {
		return nil, err
	}
	defer root.End(req)
	return head, root.Edge().ReadAt(req, blk.Buf(head[:size]), 0, 0)
}
