package hostile

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"
)

// mostConverted is the largest disk that is compared with what qemu-img makes of it.
const mostConverted = 64 << 20

// reference compares what was read with what qemu-img reads from the same image, unless it refuses
// the image.
func (r *run) reference() error {
	if r.size == 0 || r.size > mostConverted || len(r.m.may) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", "-W", imageName, "reference.raw")
	cmd.Dir = r.s.work()
	if out, err := cmd.CombinedOutput(); err != nil {
		r.note("qemu-img: %v %.200s", err, out)
		return nil
	}
	defer os.Remove(r.path("reference.raw"))
	f, err := os.Open(r.path("reference.raw"))
	if err != nil {
		return err
	}
	defer f.Close()
	if i, err := f.Stat(); err != nil || i.Size() != r.size {
		return &Failure{"another size than the reference's", fmt.Sprintf("%d, not %d", r.size, i.Size()), false}
	}
	b := make([]byte, sector)
	for s, may := range r.m.may {
		if _, err := f.ReadAt(b, s*sector); err != nil {
			return err
		}
		if may[0] != r.m.hash(b) {
			return &Failure{"other data than the reference's", fmt.Sprintf("at %d (cluster %d of the disk)", s*sector, s*sector>>r.c.Base.ClusterBits), false}
		}
	}
	return nil
}
