package nbd

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
)

// oracle starts qemu-storage-daemon with the exports that reference() has and returns its
// socket.
func oracle(t *testing.T, image string) string {
	t.Helper()
	exe, err := exec.LookPath("qemu-storage-daemon")
	if err != nil {
		t.Skip("SKIPPED: qemu-storage-daemon is not installed, nothing to compare with")
	}
	path := filepath.Join(t.TempDir(), "o")
	cmd := exec.Command(exe,
		"--blockdev", "file,node-name=n,filename="+image,
		"--blockdev", "null-co,node-name=ro,size=65536,read-zeroes=on",
		"--nbd-server", "addr.type=unix,addr.path="+path,
		"--export", "nbd,id=x,node-name=n,name=x,writable=on,allocation-depth=on",
		"--export", "nbd,id=ro,node-name=ro,name=ro,description=the read-only one")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	eventually(t, "qemu-storage-daemon listens", func() bool {
		nc, err := net.Dial("unix", path)
		if err == nil {
			nc.Close()
		}
		return err == nil
	})
	return path
}

// reference starts our server with the same exports.
func reference(t *testing.T, image string) string {
	t.Helper()
	d := newFileDevice(t, 1<<20)
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	d.f = f
	s, _, path := server(t, d, Options{MaxConns: 100})
	ro := newFileDevice(t, 65536)
	spec := Spec{
		Name: "ro", Description: "the read-only one", HasDescription: true, Size: 65536, ReadOnly: true, Device: ro,
	}
	if _, err := s.Add(spec); err != nil {
		t.Fatal(err)
	}
	return path
}

// converse sends b and returns all that comes until the server hangs up or pauses.
func converse(t *testing.T, path string, b []byte) []byte {
	t.Helper()
	nc, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	nc.SetDeadline(time.Now().Add(patience))
	nc.Write(b)
	nc.(*net.UnixConn).CloseWrite()
	var got bytes.Buffer
	got.ReadFrom(nc)
	return got.Bytes()
}

func opt(opt uint32, data ...byte) []byte { return nbdwire.AppendOption(nil, opt, data) }

func cat(bs ...[]byte) []byte { return bytes.Join(bs, nil) }

func name(n string, infos ...uint16) []byte {
	return (&nbdwire.InfoRequest{Name: n, Infos: infos}).Append(nil)
}

// Handshakes are equal to qemu-storage-daemon's to the byte.
func TestHandshakeEqualsReference(t *testing.T) {
	image := newImage(t)
	theirs, ours := oracle(t, image), reference(t, image)
	flags := func(f byte) []byte { return []byte{0, 0, 0, f} }
	structured := opt(nbdwire.OptStructuredReply)
	meta := func(o uint32, n string, qs ...string) []byte {
		return opt(o, nbdwire.AppendMetaQueries(nil, n, qs...)...)
	}
	const list, set = nbdwire.OptListMetaContext, nbdwire.OptSetMetaContext
	long := strings.Repeat("n", 4097)
	for what, in := range map[string][]byte{
		"nothing":              nil,
		"flags only":           flags(3),
		"unknown flags":        flags(7),
		"abort":                cat(flags(3), opt(nbdwire.OptAbort)),
		"abort with data":      cat(flags(3), opt(nbdwire.OptAbort, 1, 2)),
		"list":                 cat(flags(3), opt(nbdwire.OptList)),
		"list with data":       cat(flags(3), opt(nbdwire.OptList, 1), opt(nbdwire.OptList)),
		"unknown option":       cat(flags(3), opt(99, 1, 2, 3), opt(nbdwire.OptList)),
		"peek":                 cat(flags(3), opt(4)),
		"starttls":             cat(flags(3), opt(nbdwire.OptStartTLS)),
		"starttls with data":   cat(flags(3), opt(nbdwire.OptStartTLS, 1)),
		"structured":           cat(flags(3), structured, structured),
		"structured with data": cat(flags(3), opt(nbdwire.OptStructuredReply, 1), structured),
		"extended headers":     cat(flags(3), opt(nbdwire.OptExtendedHeaders)),
		"info":                 cat(flags(3), opt(nbdwire.OptInfo, name("x")...)),
		"info structured":      cat(flags(3), structured, opt(nbdwire.OptInfo, name("x", 3, 0, 1, 2, 99)...)),
		"info read-only":       cat(flags(1), opt(nbdwire.OptInfo, name("ro", 1, 3)...)),
		"info missing":         cat(flags(3), opt(nbdwire.OptInfo, name("none")...), opt(nbdwire.OptInfo, name(long[:100])...)),
		"info long":            cat(flags(3), opt(nbdwire.OptInfo, name(long)...)),
		"info lengths": cat(flags(3), opt(nbdwire.OptInfo, 0, 0, 0, 9, 'x'), opt(nbdwire.OptInfo),
			opt(nbdwire.OptInfo, 0, 0, 0, 1, 'x', 0, 2, 0, 3)),
		"info NUL":                cat(flags(3), opt(nbdwire.OptInfo, 0, 0, 0, 1, 0, 0, 0)),
		"info trailing":           cat(flags(3), opt(nbdwire.OptInfo, 0, 0, 0, 1, 'x', 0, 0, 7)),
		"go":                      cat(flags(3), opt(nbdwire.OptGo, name("x")...)),
		"go read-only structured": cat(flags(3), structured, opt(nbdwire.OptGo, name("ro", 3)...)),
		"go missing":              cat(flags(3), opt(nbdwire.OptGo, name("")...), opt(nbdwire.OptGo, name("x")...)),
		"export name":             cat(flags(3), opt(nbdwire.OptExportName, 'x')),
		"export name with zeroes": cat(flags(1), opt(nbdwire.OptExportName, 'x')),
		"export name old":         cat(flags(0), opt(nbdwire.OptExportName, 'x')),
		"export name missing":     cat(flags(3), opt(nbdwire.OptExportName, 'y')),
		"export name long":        cat(flags(3), opt(nbdwire.OptExportName, []byte(long)...)),
		"old style client":        cat(flags(0), opt(nbdwire.OptList)),
		"bad magic":               cat(flags(3), bytes.Repeat([]byte{1}, 16)),
		"too long an option":      cat(flags(3), []byte("IHAVEOPT"), []byte{0, 0, 0, 99, 2, 0, 0, 1}),
		"meta before structured":  cat(flags(3), meta(list, "x"), meta(set, "x")),
		"meta list all":           cat(flags(3), structured, meta(list, "x"), meta(list, "ro")),
		"meta list some": cat(flags(3), structured, meta(list, "x", "base:"), meta(list, "x", "qemu:"), meta(list, "x", "qemu:allocation-depth"),
			meta(list, "x", "base:none"), meta(list, "x", "other:"), meta(list, "x", ""), meta(list, "ro", "qemu:")),
		"meta list missing": cat(flags(3), structured, meta(list, "none", "base:allocation")),
		"meta set": cat(flags(3), structured, meta(set, "x", "base:allocation"), meta(set, "x", "base:allocation", "qemu:allocation-depth"),
			meta(set, "x", "base:", "qemu:"), meta(set, "ro", "qemu:allocation-depth"), meta(set, "x")),
		"meta lengths": cat(flags(3), structured, opt(set), opt(set, 0, 0, 0, 1, 'x'),
			opt(set, 0, 0, 0, 1, 'x', 0, 0, 0, 1, 0, 0, 0, 9), opt(list)),
		"meta NUL":  cat(flags(3), structured, meta(set, "x", "a\x00b"), meta(set, "a\x00")),
		"meta long": cat(flags(3), structured, meta(list, "x", long, "base:allocation"), meta(list, long)),
	} {
		a, b := converse(t, theirs, in), converse(t, ours, in)
		if !bytes.Equal(a, b) {
			t.Errorf("%s:\nreference\n%sours\n%s", what, hex.Dump(a), hex.Dump(b))
		}
	}
}

// newImage is a file with data in [0, 64k) and [512k, 576k), holes elsewhere, 1 MiB.
func newImage(t *testing.T) string {
	t.Helper()
	f, err := os.Create(filepath.Join(tmpfs(t), fmt.Sprintf("nbd-test-%d", os.Getpid())))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	t.Cleanup(func() { os.Remove(f.Name()) })
	f.Truncate(1 << 20)
	f.WriteAt(pattern(65536, 1), 0)
	f.WriteAt(pattern(65536, 2), 512<<10)
	return f.Name()
}

// What requests are answered: the same errors, texts, data and extents as from
// qemu-storage-daemon. How a
// reply is divided into chunks may differ.
func TestRequestsEqualReference(t *testing.T) {
	image := newImage(t)
	theirs, ours := oracle(t, image), reference(t, image)
	var qs []nbdwire.Request
	flags := []uint16{0, nbdwire.CmdFlagFUA, nbdwire.CmdFlagNoHole, nbdwire.CmdFlagDF, nbdwire.CmdFlagReqOne, 1 << 15}
	for _, cmd := range []uint16{nbdwire.CmdRead, nbdwire.CmdWrite, nbdwire.CmdFlush, nbdwire.CmdTrim, nbdwire.CmdCache,
		nbdwire.CmdWriteZeroes, nbdwire.CmdBlockStatus, 8, 77} {
		for _, r := range [][2]uint64{{0, 0}, {0, 512}, {4096, 70000}, {500 << 10, 100 << 10}, {1 << 20, 0},
			{1<<20 - 512, 1024}, {1<<20 + 1, 0}, {1 << 63, 1}, {0, 1 << 20}} {
			for _, f := range flags {
				qs = append(qs, nbdwire.Request{Cmd: cmd, Off: r[0], Len: uint64(r[1]), Flags: f})
			}
		}
	}
	if raceEnabled {
		rand.Shuffle(len(qs), func(i, j int) { qs[i], qs[j] = qs[j], qs[i] })
		qs = qs[:60]
	}
	qs = append(qs, nbdwire.Request{Cmd: nbdwire.CmdRead, Len: 32<<20 + 1},
		nbdwire.Request{Cmd: nbdwire.CmdCache, Len: 32<<20 + 1})
	for _, structured := range []bool{false, true} {
		var contexts []string
		if structured {
			contexts = []string{nbdwire.ContextAllocation, nbdwire.ContextDepth}
		}
		a, b := open(t, theirs, structured, contexts...), open(t, ours, structured, contexts...)
		for _, q := range qs {
			var payload []byte
			if q.Cmd == nbdwire.CmdWrite {
				// What the file holds there already: both work on the same one.
				payload = make([]byte, q.Len)
				f, _ := os.Open(image)
				f.ReadAt(payload, int64(min(q.Off, 1<<40)))
				f.Close()
			}
			if q.Cmd == nbdwire.CmdTrim || q.Cmd == nbdwire.CmdWriteZeroes {
				if q.Off < 600<<10 && q.Len > 0 {
					q.Off += 600 << 10 // leaves the data alone
				}
			}
			x, y := a.do(q, payload...), b.do(q, payload...)
			if structured && q.Cmd == nbdwire.CmdRead && q.Len < mapMin {
				x.holes, y.holes = 0, 0
			}
			if !reflect.DeepEqual(x, y) {
				x.data, y.data = nil, nil
				t.Errorf("structured=%v %+v:\nreference %+v\nours      %+v", structured, q, x, y)
			}
		}
	}
	// What ends the connection, with and without a last word.
	for what, in := range map[string][]byte{
		"bad magic":  bytes.Repeat([]byte{7}, nbdwire.RequestSize),
		"disconnect": (&nbdwire.Request{Cmd: nbdwire.CmdDisc, Flags: 0xffff, Off: 1 << 63, Len: 77}).Append(nil),
		"long write": (&nbdwire.Request{Cmd: nbdwire.CmdWrite, Len: 32<<20 + 1}).Append(nil),
	} {
		var got [2]string
		for i, path := range []string{theirs, ours} {
			c := open(t, path, true)
			c.put(in)
			c.nc.(*net.UnixConn).CloseWrite()
			var b bytes.Buffer
			b.ReadFrom(c.r)
			got[i] = hex.Dump(b.Bytes())
		}
		if got[0] != got[1] {
			t.Errorf("%s:\nreference\n%sours\n%s", what, got[0], got[1])
		}
	}
}
