package chardev

import (
	"context"
	"fmt"
	"testing"
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
