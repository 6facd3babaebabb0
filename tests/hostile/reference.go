package hostile

import (
	"context"
	"os"
	"os/exec"
	"time"

	"qblockd/tests/trial"
)

// mostConverted is the largest disk that is compared with what qemu-img makes of it.
const mostConverted = 64 << 20

// reference compares what was read with what qemu-img reads from the same image, unless it refuses
// the image.
func (r *run) reference() {
	if r.size == 0 || r.size > mostConverted || len(r.m.may) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-W", imageName, "reference.raw")
	cmd.Dir = r.s.work()
	if out, err := cmd.CombinedOutput(); err != nil {
		r.note("qemu-img: %v %.200s", err, out)
		return
	}
	defer os.Remove(r.path("reference.raw"))
	f := trial.Get(os.Open(r.path("reference.raw")))
	defer f.Close()
	if n := trial.Get(f.Stat()).Size(); n != r.size {
		fail(false, "another size than QEMU's", "%d, not %d", r.size, n)
	}
	b := make([]byte, sector)
	for s, may := range r.m.may {
		trial.Get(f.ReadAt(b, s*sector))
		if may[0] != r.m.hash(b) {
			fail(false, "other data than QEMU's", "at %d (cluster %d of the disk)",
				s*sector, s*sector>>r.c.Base.ClusterBits)
		}
	}
}
