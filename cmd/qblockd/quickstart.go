package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"text/tabwriter"

	"golang.org/x/sys/unix"

	"qblockd/cmd/qblockd/cmdline"
	"qblockd/schema/types"
)

// sampleSize is the virtual size of the disk that --quickstart makes in bytes.
const sampleSize = 1 << 30

// quickstart serves a disk with a monitor and an NBD server, all in dir, and shows what to try. The
// disk is made when it is not there yet.
func (d *daemon) quickstart(ctx context.Context, it cmdline.Item) error {
	dir := it.Arg
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	// Locked for the life of the process: a socket does not tell whether somebody listens on it, and
	// would be taken over.
	if fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return &fs.PathError{Op: "open", Path: dir, Err: err}
	} else if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err == unix.EWOULDBLOCK {
		unix.Close(fd)
		return fmt.Errorf("a quickstart runs in '%s' already: use it (its monitor is %s), or end it, or take another folder",
			dir, path("qmp.sock"))
	}
	if err := d.sampleDisk(ctx, path("disk.qcow2")); err != nil {
		return err
	}
	for _, o := range []struct{ long, arg string }{
		{"blockdev", "qcow2,node-name=disk,discard=unmap,file.driver=file,file.discard=unmap,file.filename=" + path("disk.qcow2")},
		{"nbd-server", "addr.type=unix,addr.path=" + path("nbd.sock")},
		{"export", "nbd,id=disk,node-name=disk,writable=on"},
		{"chardev", "socket,id=quickstart,server=on,wait=off,path=" + path("qmp.sock")},
		{"monitor", "quickstart"},
	} {
		it := cmdline.Item{Option: &cmdline.Option{Long: o.long}, Arg: o.arg, Words: []string{"--" + o.long, o.arg}}
		if err := d.apply(ctx, it); err != nil {
			return err
		}
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintf(w, quickstartText, path("disk.qcow2"), path("qmp.sock"), path("nbd.sock"))
	return w.Flush()
}

// quickstartText is in columns that tabs end.
const quickstartText = `qblockd is up.

  disk	%[1]s	(1 GiB, qcow2, node "disk")
  QMP	%[2]s
  NBD	%[3]s	(export "disk", writable)

Try, in another terminal:

  bin/qblockctl -s %[2]s graph
  bin/qblockctl -s %[2]s shell	TAB completes, help explains
  socat -,icanon=0 %[2]s	then type  {"execute": "qmp_capabilities"}
	and  {"execute": "query-block-exports"}
  nbdinfo 'nbd+unix:///disk?socket=%[3]s'
  qemu-io -f raw -c 'write -P 7 0 1M' 'nbd+unix:///disk?socket=%[3]s'

Ctrl-C ends it; the disk stays.
`

func (d *daemon) sampleDisk(ctx context.Context, name string) error {
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Into place only when it is whole.
	tmp := name + ".new"
	steps := []*types.BlockdevCreateOptions{
		{Driver: types.BlockdevDriverFile, U: &types.BlockdevCreateOptionsFile{Filename: tmp}},
		{Driver: types.BlockdevDriverQcow2, U: &types.BlockdevCreateOptionsQcow2{Size: sampleSize,
			File: types.BlockdevRef{Definition: &types.BlockdevOptions{
				Driver: types.BlockdevDriverFile, U: &types.BlockdevOptionsFile{Filename: tmp}}}}},
	}
	for _, o := range steps {
		if err := d.nodes.Creator(o)(ctx, func() {}); err != nil {
			return err
		}
	}
	return os.Rename(tmp, name)
}
