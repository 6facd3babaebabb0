package crypto

import (
	"bytes"
	"os"
	"slices"
	"sync"
	"testing"
)

func mappings(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(b, []byte("\n"))
}

// TestManyKeys: keys have memory of their own each, which is 0 at first, also when others have had
// it before; and many of them take few mappings.
func TestManyKeys(t *testing.T) {
	sizes := []int{1, 63, 64, 65, 100, 128, 1000, maxCell - 1, maxCell, maxCell + 1}
	before := mappings(t)
	var all []*Key
	for i := range 5000 {
		n := sizes[i%len(sizes)]
		if n >= maxCell-1 && i > 100 {
			n = 32
		}
		k, err := NewKey(n)
		if err != nil {
			t.Fatal(err)
		}
		if len(k.Bytes()) != n || slices.ContainsFunc(k.Bytes(), func(b byte) bool { return b != 0 }) {
			t.Fatalf("%d bytes of %d are not 0", len(k.Bytes()), n)
		}
		for j := range k.Bytes() {
			k.Bytes()[j] = byte(i)
		}
		all = append(all, k)
	}
	if n := mappings(t) - before; n > 150 {
		t.Errorf("%d keys take %d mappings", len(all), n)
	}
	for i, k := range all {
		if slices.ContainsFunc(k.Bytes(), func(b byte) bool { return b != byte(i) }) {
			t.Fatalf("key %d has been written by another", i)
		}
		k.Shorten(len(k.Bytes()) / 2)
		mem := k.mem[:cap(k.mem)]
		if i%2 == 0 {
			k.Close()
			if k.Close(); k.Bytes() != nil {
				t.Fatal("a closed key has bytes")
			}
		}
		if i == 3 && mem[len(mem)/2] != 0 {
			t.Error("what was cut off is still there")
		}
	}
	for _, k := range all {
		k.Close()
	}
	if n := mappings(t) - before; n > 30 {
		t.Errorf("%d mappings are left", n)
	}
}

// TestKeysAtOnce has keys come and go at once.
func TestKeysAtOnce(t *testing.T) {
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 2000 {
				k, err := CopyKey(bytes.Repeat([]byte{byte(i)}, 1+j%300))
				if err != nil {
					t.Error(err)
					return
				}
				if slices.ContainsFunc(k.Bytes(), func(b byte) bool { return b != byte(i) }) {
					t.Error("two have one key")
				}
				k.Close()
			}
		})
	}
	wg.Wait()
	var none *Key
	if none.Close(); none.Bytes() != nil {
		t.Error("a nil key has bytes")
	}
}
