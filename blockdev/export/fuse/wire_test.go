package fuse

import (
	"encoding/hex"
	"testing"
)

// head makes a request as the kernel would send it.
func head(op opcode, unique uint64, arg []byte) []byte {
	b := make([]byte, inHeaderSize, inHeaderSize+len(arg))
	le.PutUint32(b, uint32(inHeaderSize+len(arg)))
	le.PutUint32(b[4:], uint32(op))
	le.PutUint64(b[8:], unique)
	return append(b, arg...)
}

func TestParse(t *testing.T) {
	var q request
	b := head(opRead, 7, make([]byte, rwArgSize))
	if err := q.parse(b); err != nil || q.op != opRead || q.unique != 7 || len(q.arg) != rwArgSize {
		t.Fatal(err, q)
	}
	for n := range b {
		if q.parse(b[:n]) == nil {
			t.Errorf("%d bytes of %d are taken", n, len(b))
		}
	}
	if q.parse(append(b, 0)) == nil {
		t.Error("a longer one is taken")
	}
}

// TestRanges: offsets that are negative to us, or go beyond what a file can have.
func TestRanges(t *testing.T) {
	arg := func(off, n uint64) []byte {
		b := make([]byte, rwArgSize)
		le.PutUint64(b[8:], off)
		le.PutUint64(b[16:], n) // the size of I/O is its lower half
		return b
	}
	var a ioArg
	var f allocArg
	for _, c := range []struct {
		off, n uint64
		ok     bool
	}{
		{0, 0, true}, {1 << 40, 1 << 20, true}, {1<<63 - 1, 0, true}, {1<<63 - 1, 1, false}, {1 << 63, 0, false},
		{1<<64 - 1, 1, false},
	} {
		if err := a.parse(arg(c.off, c.n), false); (err == nil) != c.ok {
			t.Errorf("I/O of %d at %d: %v", c.n, c.off, err)
		}
		if err := f.parse(arg(c.off, c.n)); (err == nil) != c.ok {
			t.Errorf("fallocate of %d at %d: %v", c.n, c.off, err)
		}
	}
	if f.parse(arg(0, 1<<63)) == nil {
		t.Error("a negative length is taken")
	}
	w := append(arg(0, 3), "ab"...)
	if a.parse(w, true) == nil {
		t.Error("a write without all its data is taken")
	}
	if err := a.parse(append(w, 'c'), true); err != nil || string(a.data) != "abc" {
		t.Error(err, a.data)
	}
}

// TestReplies has the sizes of the kernel's structures, and one of them in full.
func TestReplies(t *testing.T) {
	for _, c := range []struct {
		name string
		b    []byte
		want int
	}{
		{"init", (&initReply{}).appendTo(nil), 64},
		{"attributes", (&attr{}).appendTo(nil, 1), 16 + attrSize},
		{"statfs", appendStatfs(nil), 80},
	} {
		if len(c.b) != c.want {
			t.Errorf("%s: %d bytes, not %d", c.name, len(c.b), c.want)
		}
	}
	b := make([]byte, outHeaderSize)
	putHead(b, 0x0102030405060708, 2, 4)
	if got := hex.EncodeToString(b); got != "14000000feffffff0807060504030201" && got != "00000014fffffffe0102030405060708" {
		t.Error(got)
	}
}

func TestTopMount(t *testing.T) {
	table := []byte(`22 1 0:20 / / rw - ext4 /dev/vda rw
40 22 0:39 / /a\040b/mp rw,nosuid shared:3 - fuse.qblockd qblockd rw,user_id=0
41 22 0:40 / /c rw - fuse.qblockd qblockd rw
42 41 0:41 / /c rw - tmpfs none rw
bad line
`)
	for path, want := range map[string]string{"/a b/mp": mountType, "/c": "tmpfs", "/a": "", "/": "ext4"} {
		if got := topMount(table, path); got != want {
			t.Errorf("%s: %q, not %q", path, got, want)
		}
	}
}
