package nbd

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"qblockd/blockdev/nbdwire"
)

// oracle starts a qemu-storage-daemon with the exports that reference() has and returns its
// socket.
func oracle(t *testing.T, name, image string) string {
	t.Helper()
	exe, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("SKIPPED: %s is not installed, nothing to compare with", name)
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
	eventually(t, "the reference listens", func() bool {
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
	handshakesEqual(t, "qemu-storage-daemon", handshakes())
}

// So are those about extended headers, which QEMU has from 8.2 on.
func TestExtendedHandshakeEqualsReference(t *testing.T) {
	extended, structured := opt(nbdwire.OptExtendedHeaders), opt(nbdwire.OptStructuredReply)
	set := func(export string) []byte {
		return opt(nbdwire.OptSetMetaContext, nbdwire.AppendMetaQueries(nil, export, "base:allocation", "qemu:allocation-depth")...)
	}
	start := cat([]byte{0, 0, 0, 3}, extended)
	all := handshakes()
	for what, in := range map[string][]byte{
		"extended headers":          start,
		"extended with data":        cat([]byte{0, 0, 0, 3}, opt(nbdwire.OptExtendedHeaders, 1), extended),
		"extended twice":            cat(start, extended, structured, extended),
		"extended after structured": cat([]byte{0, 0, 0, 3}, structured, extended, structured),
		"extended info":             cat(start, opt(nbdwire.OptInfo, name("x", 3)...), opt(nbdwire.OptInfo, name("ro", 3)...)),
		"extended go":               cat(start, opt(nbdwire.OptGo, name("x", 3)...)),
		"extended status":           cat(start, set("x"), opt(nbdwire.OptInfo, name("x")...), opt(nbdwire.OptGo, name("x")...)),
		"extended status elsewhere": cat(start, set("ro"), opt(nbdwire.OptGo, name("x")...)),
		"extended status dropped":   cat(start, set("x"), set("none"), opt(nbdwire.OptGo, name("x")...)),
		"extended export name":      cat(start, opt(nbdwire.OptExportName, 'x')),
		"extended old style":        cat([]byte{0, 0, 0, 0}, extended),
	} {
		all[what] = in
	}
	handshakesEqual(t, "qsd10", all)
}

// handshakesEqual compares what comes back for what clients send.
func handshakesEqual(t *testing.T, exe string, in map[string][]byte) {
	t.Helper()
	image := newImage(t)
	theirs, ours := oracle(t, exe, image), reference(t, image)
	for what, in := range in {
		a, b := converse(t, theirs, in), converse(t, ours, in)
		if !bytes.Equal(a, b) {
			t.Errorf("%s:\nreference\n%sours\n%s", what, hex.Dump(a), hex.Dump(b))
		}
	}
}

// handshakes are what clients send that want no extended headers.
func handshakes() map[string][]byte {
	flags := func(f byte) []byte { return []byte{0, 0, 0, f} }
	structured := opt(nbdwire.OptStructuredReply)
	meta := func(o uint32, n string, qs ...string) []byte {
		return opt(o, nbdwire.AppendMetaQueries(nil, n, qs...)...)
	}
	const list, set = nbdwire.OptListMetaContext, nbdwire.OptSetMetaContext
	long := strings.Repeat("n", 4097)
	return map[string][]byte{
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
	for form, exe := range map[nbdwire.Form]string{
		nbdwire.Simple: "qemu-storage-daemon", nbdwire.Structured: "qemu-storage-daemon", nbdwire.Extended: "qsd10",
	} {
		t.Run(fmt.Sprintf("form=%d", form), func(t *testing.T) { requestsEqual(t, exe, form) })
	}
}

// manyRequests are good and bad ones of each kind.
func manyRequests() (qs []nbdwire.Request) {
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
	return append(qs, nbdwire.Request{Cmd: nbdwire.CmdRead, Len: 32<<20 + 1},
		nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Len: math.MaxUint32},
		nbdwire.Request{Cmd: nbdwire.CmdTrim, Len: math.MaxUint32})
}

// requestsEqual compares the answers that clients of form get from the reference exe and from us.
func requestsEqual(t *testing.T, exe string, form nbdwire.Form) {
	image := newImage(t)
	theirs, ours := oracle(t, exe, image), reference(t, image)
	qs := manyRequests()
	if form != nbdwire.Extended { // with extended headers there is no reason to refuse it
		qs = append(qs, nbdwire.Request{Cmd: nbdwire.CmdCache, Len: 32<<20 + 1})
	}
	var contexts []string
	if form != nbdwire.Simple {
		contexts = []string{nbdwire.ContextAllocation, nbdwire.ContextDepth}
	}
	a, b := open(t, theirs, form, contexts...), open(t, ours, form, contexts...)
	compare := func(q nbdwire.Request, payload []byte) {
		t.Helper()
		x, y := a.do(q, payload...).inOldWords(), b.do(q, payload...)
		if form != nbdwire.Simple && q.Cmd == nbdwire.CmdRead && q.Len < mapMin {
			x.holes, y.holes = 0, 0
		}
		if !reflect.DeepEqual(x, y) {
			x.data, y.data = nil, nil
			t.Errorf("%+v %x:\nreference %+v\nours      %+v", q, payload, x, y)
		}
	}
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
		compare(q, payload)
	}
	if form == nbdwire.Extended {
		for _, x := range payloads() {
			compare(x.q, x.payload)
		}
	}
	endsEqual(t, form, theirs, ours)
}

// endsEqual compares what ends the connection, with and without a last word.
func endsEqual(t *testing.T, form nbdwire.Form, theirs, ours string) {
	t.Helper()
	for what, q := range map[string]nbdwire.Request{
		"bad magic":    {Cmd: nbdwire.CmdRead},
		"disconnect":   {Cmd: nbdwire.CmdDisc, Flags: 0xffff, Off: 1 << 63, Len: 77},
		"long write":   {Cmd: nbdwire.CmdWrite, Len: 32<<20 + 1},
		"long payload": {Cmd: nbdwire.CmdWrite, Len: 32<<20 + 1, Flags: nbdwire.CmdFlagPayload},
	} {
		var got [2]answer
		for i, path := range []string{theirs, ours} {
			c := open(t, path, form)
			in := q.Append(nil)
			if form == nbdwire.Extended {
				in = q.AppendExt(nil)
			}
			if what == "bad magic" {
				in[0] = 7
			}
			c.put(in)
			c.nc.(*net.UnixConn).CloseWrite()
			if _, err := c.r.Peek(1); err == nil {
				got[i] = c.reply(q).inOldWords()
			}
			c.eof()
		}
		if !reflect.DeepEqual(got[0], got[1]) {
			t.Errorf("%s:\nreference %+v\nours      %+v", what, got[0], got[1])
		}
	}
}

var newWords = regexp.MustCompile(`len \(\d+\) is|, expected 0x21e41c71`)

// inOldWords is a with texts as they were before there were extended headers.
func (a answer) inOldWords() answer {
	a.msg = newWords.ReplaceAllStringFunc(a.msg, func(s string) string {
		if before, ok := strings.CutSuffix(s, ") is"); ok {
			return before + " ) is"
		}
		return ""
	})
	return a
}

// payload is a request that is no write, with what follows it.
type payload struct {
	q       nbdwire.Request
	payload []byte
}

// payloads are questions for the block status in some contexts, good and bad, and payloads of what
// can have none.
func payloads() (l []payload) {
	size := uint64(1 << 20)
	status := func(off uint64, flags uint16, b []byte) {
		l = append(l, payload{nbdwire.Request{Cmd: nbdwire.CmdBlockStatus, Off: off, Flags: flags, Len: uint64(len(b))}, b})
	}
	for _, ids := range [][]uint32{{0}, {1}, {0, 1}, {1, 0}, {}, {2}, {0, 0}, {1, 1}, {0, 1, 0}, {0, 7}, {1 << 31}} {
		for _, flag := range []uint16{0, nbdwire.CmdFlagReqOne, nbdwire.CmdFlagDF} {
			status(0, flag, nbdwire.AppendStatusPayload(nil, size, ids...))
		}
		status(4096, 0, nbdwire.AppendStatusPayload(nil, 70000, ids...))
		status(4096, 0, nbdwire.AppendStatusPayload(nil, 0, ids...))
	}
	for _, n := range []uint64{size, size - 4095, math.MaxUint64} {
		status(4096, 0, nbdwire.AppendStatusPayload(nil, n, 0)) // beyond the end
	}
	for n := 1; n < 30; n += 2 {
		status(0, 0, make([]byte, n))
	}
	status(0, 0, make([]byte, 1<<20))
	status(size+1, 0, make([]byte, 8))
	for _, cmd := range []uint16{
		nbdwire.CmdRead, nbdwire.CmdFlush, nbdwire.CmdTrim, nbdwire.CmdCache, nbdwire.CmdWriteZeroes, 8, 77,
	} {
		for _, n := range []int{1, 512, 1 << 20, 2 << 20} {
			l = append(l, payload{nbdwire.Request{Cmd: cmd, Off: 4096, Len: uint64(n)}, make([]byte, n)})
		}
	}
	return l
}
