package interop

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/tests/daemon"
)

// libnbdPrelude are helpers of the scripts below, which use libnbd as its own tests of
// qemu-storage-daemon do: strict about the protocol, with each chunk and extent seen by itself.
const libnbdPrelude = `
import nbd, os, socket, sys
path, binary, image = sys.argv[1:4]
def connect(name="x", *contexts, socket=path):
    h = nbd.NBD()
    h.set_export_name(name)
    for c in contexts: h.add_meta_context(c)
    h.connect_unix(socket)
    return h
def status(h, n, off=0, flags=0):
    seen = {}
    def extent(context, offset, entries, error):
        assert offset == off and error.value == 0 and context not in seen, (context, offset)
        seen[context] = entries
        return 0
    h.block_status(n, off, extent, flags)
    return seen
def fails(f, *errnos):
    try: f()
    except nbd.Error as e:
        assert e.errno in errnos, e
        return
    raise Exception("no error")
`

// TestLibnbd has libnbd look at exports of a daemon: lists, structured reads, the block status of
// an image and of a dirty bitmap, and a client that dislikes what it is told.
func TestLibnbd(t *testing.T) {
	need(t, "qemu-img", "qemu-io", "bash")
	const python = "/usr/bin/python3"
	if exec.Command(python, "-c", "import nbd").Run() != nil {
		t.Skip("SKIPPED: the Python module of libnbd is not installed")
	}
	dir := t.TempDir()
	sh(t, dir, `exec >/dev/null
		qemu-img create -f qcow2 d.qcow2 1M; qemu-img create -f qcow2 big.qcow2 8T
		qemu-io -f qcow2 -c 'write -P 1 0 128k' d.qcow2; qemu-io -f qcow2 -c 'write -P 9 6T 64k' -c 'write -P 9 7T 64k' big.qcow2
		cp d.qcow2 handed.qcow2`)
	d := daemon.Start(t, dir,
		"--blockdev", "qcow2,node-name=d,discard=unmap,file.driver=file,file.filename=d.qcow2",
		"--blockdev", "qcow2,node-name=big,file.driver=file,file.filename=big.qcow2",
		"--export", "nbd,id=b,node-name=big,name=big,writable=on,description=a large disk",
		"--export", "nbd,id=x,node-name=d,name=plain")
	q := d.Dial(t)
	q.Must(t, "block-dirty-bitmap-add", map[string]any{"node": "d", "name": "bits"})
	q.Must(t, "block-export-add", map[string]any{"type": "nbd", "id": "w", "node-name": "d", "name": "w", "writable": true})
	c, err := d.DialNBD("w")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.WriteAt(make([]byte, 65536), 65536); err != nil {
		t.Fatal(err)
	}
	if err := c.Zero(512<<10, 65536); err != nil {
		t.Fatal(err)
	}
	c.Close()
	q.Must(t, "block-dirty-bitmap-disable", map[string]any{"node": "d", "name": "bits"})
	q.Must(t, "block-export-add",
		map[string]any{"type": "nbd", "id": "dirty", "node-name": "d", "name": "dirty", "bitmaps": []string{"bits"}})
	for name, script := range libnbdScripts {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command(python, "-c", libnbdPrelude+script, d.NBDSocket(), daemon.Binary(t),
				filepath.Join(dir, "handed.qcow2")).CombinedOutput()
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	t.Run("large", func(t *testing.T) {
		need(t, "nbdinfo13")
		got := strings.Join(strings.Fields(sh(t, dir, "nbdinfo13 --map 'nbd+unix:///big?socket=nbd.sock'")), " ")
		const at6, at7 = int64(6 << 40), int64(7 << 40)
		want := fmt.Sprintf("0 %d 3 hole,zero %d 65536 0 data %d %d 3 hole,zero %d 65536 0 data %d %d 3 hole,zero",
			at6, at6, at6+65536, int64(1<<40-65536), at7, at7+65536, int64(1<<40-65536))
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	})
}

// libnbdScripts are programs that end with an error if something is wrong.
var libnbdScripts = map[string]string{
	"list": `
h = nbd.NBD()
h.set_opt_mode(True)
h.connect_unix(path)
found = {}
n = h.opt_list(lambda name, description: found.update({name: description}) or 0)
assert n == 4 and found == {"big": "a large disk", "plain": "", "w": "", "dirty": ""}, found
h.set_export_name("dirty")
contexts = []
assert h.opt_list_meta_context(lambda c: contexts.append(c) or 0) == 2
assert contexts == ["base:allocation", "qemu:dirty-bitmap:bits"], contexts
h.set_export_name("none")
fails(h.opt_go, "ENOENT")
h.set_export_name("big")
h.opt_go()
assert h.get_size() == 8 << 40 and h.can_multi_conn() and not h.is_read_only()
assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096 and h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.shutdown()
`,
	"uri": `
h = nbd.NBD()
h.connect_uri("nbd+unix:///plain?socket=" + path)
assert h.is_read_only() and h.pread(512, 0) == b"\x01" * 512
h.set_strict_mode(0)
fails(lambda: h.pwrite(bytes(512), 0), "EINVAL", "EPERM")
h.shutdown()
`,
	"structured reads": `
h = connect("plain")
for off, n, flags, want in (0, 262144, 0, [(0, 65536, nbd.READ_DATA), (65536, 65536, nbd.READ_DATA), (131072, 131072, nbd.READ_HOLE)]), \
        (0, 262144, nbd.CMD_FLAG_DF, [(0, 262144, nbd.READ_DATA)]), (131072, 131072, 0, [(131072, 131072, nbd.READ_HOLE)]):
    seen = []
    got = h.pread_structured(n, off, lambda b, o, s, e: seen.append((o, len(b), s)) or 0, flags)
    # How data are divided into chunks is free; holes and order are not.
    merged = []
    for o, k, s in seen:
        if merged and merged[-1][2] == s and merged[-1][0] + merged[-1][1] == o: merged[-1] = (merged[-1][0], merged[-1][1] + k, s)
        else: merged.append((o, k, s))
    flat = []
    for o, k, s in want:
        if flat and flat[-1][2] == s and flat[-1][0] + flat[-1][1] == o: flat[-1] = (flat[-1][0], flat[-1][1] + k, s)
        else: flat.append((o, k, s))
    assert merged == flat, (merged, flat)
    assert got == h.pread(n, off)
    # A client that fails in the middle keeps its connection.
    def refuse(b, o, s, e):
        e.value = 71
        return -1
    fails(lambda: h.pread_structured(n, off, refuse, flags), "EPROTO")
assert h.pread(65536, 0) == b"\x01" * 65536
h.shutdown()
`,
	"dirty bitmap": `
bits = "qemu:dirty-bitmap:bits"
h = connect("dirty", "base:allocation", bits)
assert h.can_meta_context(bits)
s = status(h, 1 << 20)
assert s[bits] == [65536, 0, 65536, 1, 393216, 0, 65536, 1, 458752, 0], s
assert s["base:allocation"][:2] == [131072, 0] and sum(s["base:allocation"][::2]) == 1 << 20, s
s = status(h, 1 << 20, 0, nbd.CMD_FLAG_REQ_ONE)
assert s == {"base:allocation": [131072, 0], bits: [65536, 0]}, s
s = status(h, 65536, 65536 + 512)
assert s[bits] == [65024, 1, 512, 0], s
def refuse(c, o, entries, e):
    e.value = 71
    return -1
fails(lambda: h.block_status(1 << 20, 0, refuse), "EPROTO")
assert h.pread(512, 65536) == bytes(512)
h.shutdown()
`,
	"large status": `
h = connect("big", "base:allocation")
s = status(h, (4 << 30) - 512, 6 << 40)["base:allocation"]
assert s[:2] == [65536, 0] and s[3] == 3 and sum(s[::2]) == (4 << 30) - 512, s
off, seen = 5 << 40, []
while off < 8 << 40:
    for n, flags in zip(*[iter(status(h, min((4 << 30) - 512, (8 << 40) - off), off)["base:allocation"])] * 2):
        if flags == 0: seen.append((off, n))
        off += n
assert seen == [(6 << 40, 65536), (7 << 40, 65536)], seen
h.zero(2 << 30, 1 << 40); h.trim(3 << 30, 1 << 40); h.flush()
h.shutdown()
`,
	"socket handed over": `
name = path + ".handed"
client, server = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in "12")
os.set_inheritable(server.fileno(), True)
server.bind(name)
server.listen()
client.connect(name)
pid = os.fork()
if pid == 0:
    client.close()
    os.execv(binary, [binary, "--blockdev", "qcow2,node-name=n,file.driver=file,file.filename=" + image,
        "--nbd-server", "addr.type=fd,addr.str=%d" % server.fileno(), "--export", "nbd,node-name=n,id=e,name=,writable=on"])
server.close()
h = nbd.NBD()
h.connect_socket(client.fileno())
h.pwrite(b"7" * 512, 512)
assert h.pread(1024, 0) == b"\x01" * 512 + b"7" * 512
h.shutdown()
os.kill(pid, 15)
assert os.waitpid(pid, 0)[1] == 0
`,
}
