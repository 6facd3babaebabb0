package interop

import (
	"bytes"
	"os"
	"strconv"
	"testing"
)

// TestFUSETwice: one disk as two files at a time, one of them over the image itself, and what is
// written to the other. The cases are those of QEMU's iotest 308.
func TestFUSETwice(t *testing.T) {
	inBoth(t, "qcow2", func(w *fuseWorld) {
		w.must(w.add("mp", "fmt", w.mp, nil))
		w.must(w.add("img", "fmt", w.image, nil))
		w.wantSh("qemu-img compare -f raw -F raw -U mp image", "Images are identical.")
		w.wantSh("cp image copy && chmod 600 copy && cmp copy noise", "")
		w.del("mp")
		w.wantSh("qemu-img info -f raw mp | grep 'virtual size'", "virtual size: 0 B (0 bytes)")

		w.must(w.add("mp", "fmt", w.mp, writable))
		if _, err := w.try("qemu-io -f raw -c 'write -P 42 1M 64k' image 2>&1 | grep 'Permission denied'"); err != nil {
			t.Error("the export that is read-only can be written")
		}
		w.sh("qemu-io -f raw -c 'write -P 42 1M 64k' mp")
		w.sh("qemu-io -f raw -c 'write -P 42 1M 64k' copy")
		w.wantSh("cmp mp copy", "")
		w.wantSh("qemu-img compare -f raw -F raw -U mp image", "Images are identical.")
		w.del("mp")
		w.del("img")
		w.d.Stop(t)
		w.wantSh("qemu-img compare -f raw -F qcow2 copy image", "Images are identical.")
	})
}

// number is what a command says.
func (w *fuseWorld) number(command string) int64 {
	w.Helper()
	n, err := strconv.ParseInt(w.sh(command), 10, 64)
	w.must(err)
	return n
}

// TestFUSEGrows: what makes the file longer, and what does not.
func TestFUSEGrows(t *testing.T) {
	inBoth(t, "raw", func(w *fuseWorld) {
		w.q.Must(t, "blockdev-del", map[string]any{"node-name": "fmt"})
		w.must(w.add("mp", "file", w.mp, writable))
		size := func(want int64) {
			t.Helper()
			if a, b := w.number("stat -c %s mp"), w.number("stat -c %s image"); a != want || b != want {
				t.Errorf("the file has %d bytes, the image %d, not %d", a, b, want)
			}
		}
		const end, more = fuseSize, fuseSize + 64<<10
		past := "printf abcdefgh | dd of=mp bs=8 oflag=seek_bytes conv=notrunc status=none seek="
		w.wantSh(past+strconv.Itoa(end), "dd: error writing 'mp': Input/output error")
		w.wantSh(past+strconv.Itoa(end-4), "dd: error writing 'mp': Input/output error")
		w.wantSh("tail -c 4 image", "abcd")
		size(end)
		used := w.number("stat -c %b image")
		w.sh("fallocate -o " + strconv.Itoa(end) + " -l 64k mp")
		size(more)
		if w.number("stat -c %b image") <= used {
			t.Error("fallocate has allocated nothing")
		}
		w.wantSh("fallocate -l 64k mp", "fallocate: fallocate failed: Operation not supported")
		w.del("mp")

		w.must(w.add("mp", "file", w.mp, map[string]any{"writable": true, "growable": true}))
		w.sh("dd if=noise of=mp bs=1k count=100 oflag=append conv=notrunc status=none")
		w.wantSh("tail -c 102400 mp | cmp - <(head -c 102400 noise)", "")
		w.sh(past + strconv.Itoa(more+102400))
		w.wantSh("tail -c 8 image", "abcdefgh")
		w.sh("truncate -s " + strconv.Itoa(end) + " mp")
		size(end)
		w.sh("truncate -s " + strconv.Itoa(more) + " mp")
		size(more)
		w.wantSh("tail -c 65536 mp | tr -d '\\0' | wc -c", "0")
	})
}

// TestFUSEZeroes: holes are punched in the image, and found.
func TestFUSEZeroes(t *testing.T) {
	inBoth(t, "qcow2", func(w *fuseWorld) {
		w.must(w.add("mp", "fmt", w.mp, writable))
		w.sh("fallocate -p -o 1M -l 2M mp")
		w.sh("fallocate -z -o 5000 -l 100000 mp")
		copy(w.noise[1<<20:], make([]byte, 2<<20))
		copy(w.noise[5000:], make([]byte, 100000))
		got, err := os.ReadFile(w.mp)
		w.must(err)
		if !bytes.Equal(got, w.noise) {
			t.Error("the file differs")
		}
		w.wantSh(`qemu-img map -f raw --output=json mp | grep -o '"start": [0-9]*, "length": [0-9]*.*"data": [a-z]*' |`+
			` sed 's/"depth.*"data"/"data"/' | head -3 | tr '\n' ';'`, `"start": 0, "length": 1048576, "data": true;`+
			`"start": 1048576, "length": 2097152, "data": false;"start": 3145728, "length": 13631488, "data": true;`)
		w.sh("cp --sparse=auto mp copy && cmp mp copy")
		if w.number("stat -c %b copy") >= fuseSize/512 {
			t.Error("cp has found no holes")
		}
		w.sh("qemu-io -f raw -c 'write -zu 0 16M' -c 'read -P 0 0 16M' mp")
		w.del("mp")
		if n := w.number("stat -c %b image"); n > 4096 {
			t.Errorf("the image takes %d blocks", n)
		}
	})
}
