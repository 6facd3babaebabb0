package main

import (
	"testing"

	"qblockd/cmd/qblockd/cmdline"
	"qblockd/schema/types"
)

// TestRingSize: on the command line a size of 0 leaves the size to the daemon, as QEMU has it.
func TestRingSize(t *testing.T) {
	for arg, want := range map[string]int64{"ringbuf,id=c": 0, "ringbuf,id=c,size=0": 0, "ringbuf,id=c,size=64k": 65536} {
		o, err := cmdline.ParseOpts(arg, "backend", chardevOptions)
		if err != nil {
			t.Fatal(err)
		}
		b, err := chardevBackend(types.ChardevBackendKindRingbuf, o)
		if err != nil {
			t.Fatal(err)
		}
		got := int64(0)
		if n := b.U.(*types.ChardevRingbufWrapper).Data.Size; n != nil {
			got = *n
		}
		if got != want {
			t.Errorf("%s: size %d", arg, got)
		}
	}
}
