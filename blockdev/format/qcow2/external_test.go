package qcow2

import (
	"fmt"
	"os"
	"strconv"
	"testing"
)

// TestModelExternal is TestModel for images with their data in another file.
func TestModelExternal(t *testing.T) {
	base, _ := strconv.Atoi(os.Getenv("SEED"))
	var shapes []shape
	for i, cs := range []uint64{512, 4096, 65536, 2 << 20} {
		for _, data := range []string{"data", "raw"} {
			shapes = append(shapes,
				shape{cs: cs, bits: 16, v: "v3", data: data, back: data == "data"},
				shape{cs: cs, bits: 1 << i, v: "v3", data: data, comp: "zstd", lazy: i%2 == 0})
		}
	}
	for i, sh := range shapes {
		t.Run(fmt.Sprintf("%+v", sh), func(t *testing.T) {
			t.Parallel()
			testShape(t, sh, uint64(base+i+1))
		})
	}
}
