package chardev

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"

	"qblockd/schema/types"
)

// TestRingbufsTogether: what clients can make ring buffers hold is bounded, however many there are.
func TestRingbufsTogether(t *testing.T) {
	tab := newTestTable(t)
	add := func(id string, size int) error {
		_, err := tab.Add(context.Background(), id, backend(t, `{"type":"ringbuf","data":{"size":%d}}`, size))
		return err
	}
	want := fmt.Sprintf("Failed to add chardev 'r': size of ringbuf chardev must be at most %d", maxRing)
	if err := add("r", 2*maxRing); err == nil || err.Error() != want {
		t.Errorf("%v, want %q", err, want)
	}
	for i := range maxRings / maxRing {
		if err := add(fmt.Sprint("r", i), maxRing); err != nil {
			t.Fatal(err)
		}
	}
	want = fmt.Sprintf("Failed to add chardev 'r': ringbuf chardevs hold at most %d bytes together", maxRings)
	if err := add("r", 16); err == nil || err.Error() != want {
		t.Errorf("%v, want %q", err, want)
	}
	if err := tab.Remove("r0"); err != nil {
		t.Fatal(err)
	}
	if err := add("r", 16); err != nil {
		t.Error(err)
	}
}

// TestRingbufUser: what the user of a ring buffer writes is in it and in the log; ringbuf-write is
// not logged.
func TestRingbufUser(t *testing.T) {
	tab := newTestTable(t)
	log := filepath.Join(t.TempDir(), "log")
	if _, err := tab.Add(context.Background(), "r", backend(t, `{"type":"ringbuf","data":{"logfile":%q}}`, log)); err != nil {
		t.Fatal(err)
	}
	if err := tab.RingbufWrite("r", "first ", nil); err != nil {
		t.Fatal(err)
	}
	wrote := make(chan error, 1)
	if err := tab.Attach("r", func(c io.ReadWriteCloser) {
		_, err := io.WriteString(c, "then")
		wrote <- err
		_, _ = io.ReadAll(c) // nothing comes, until the device ends
	}); err != nil {
		t.Fatal(err)
	}
	if err := <-wrote; err != nil {
		t.Fatal(err)
	}
	if got, err := tab.RingbufRead("r", 100, nil); got != "first then" || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	if b, err := os.ReadFile(log); string(b) != "then" || err != nil {
		t.Errorf("log: %q, %v", b, err)
	}
}

func TestRingbuf(t *testing.T) {
	tab := newTestTable(t)
	if _, err := tab.Add(context.Background(), "r", backend(t, `{"type":"ringbuf","data":{"size":1024}}`)); err != nil {
		t.Fatal(err)
	}
	// Against the dumb way: a slice of the last 1024 bytes.
	var model []byte
	next := byte('a')
	x := uint32(1)
	for range 3000 {
		x = x*1664525 + 1013904223
		n := int(x >> 20 % 1500)
		if x&1 == 0 {
			text := make([]byte, n)
			for i := range text {
				text[i] = next
				if next++; next > 'z' {
					next = 'a'
				}
			}
			if err := tab.RingbufWrite("r", string(text), nil); err != nil {
				t.Fatal(err)
			}
			model = append(model, text...)
			model = model[max(0, len(model)-1024):]
			continue
		}
		got, err := tab.RingbufRead("r", int64(n)+1, nil)
		k := min(n+1, len(model))
		if err != nil || got != string(model[:k]) {
			t.Fatalf("%q, %v, want %q", got, err, model[:k])
		}
		model = model[k:]
	}
	b64 := types.DataFormatBase64
	for in, want := range map[string]string{"aGk": "", "aGkx=": "aGkx", "a=": "", "====": "AA==", "aG\nk=": "aGk=", "aGk=aGk=": "aGloaQ==", "aGkaGk": "aGka"} {
		_, _ = tab.RingbufRead("r", 1<<20, nil)
		if err := tab.RingbufWrite("r", in, &b64); err != nil {
			t.Error(err)
		}
		if got, err := tab.RingbufRead("r", 100, &b64); got != want || err != nil {
			t.Errorf("%q: %q, %v, want %q", in, got, err, want)
		}
	}
	if err := tab.RingbufWrite("r", "!!", &b64); err == nil || err.Error() != "Base64 data contains invalid characters" {
		t.Error(err)
	}
}
