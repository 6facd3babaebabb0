package sealed

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"qblockd/tests/daemon"
	"qblockd/tests/trial"
)

var (
	flagSeed   = flag.Uint64("sealed.seed", 1, "seed of the first trial")
	flagTrials = flag.Int("sealed.trials", 4, "how many")
	flagOps    = flag.Int("sealed.ops", 30, "how many operations each has")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestTrials plays trials of many seeds.
func TestTrials(t *testing.T) {
	if _, err := exec.LookPath("qemu-img"); err != nil {
		t.Log("NOT TESTED: there is no qemu-img to read the images")
	}
	bin := daemon.Binary(t)
	done := map[string]*atomic.Int64{}
	for _, o := range ops {
		done[o.name] = new(atomic.Int64)
	}
	t.Run("all", func(t *testing.T) {
		for i := range *flagTrials {
			seed := *flagSeed + uint64(i)
			t.Run(fmt.Sprint(seed), func(t *testing.T) {
				t.Parallel()
				play(t, bin, seed, done)
			})
		}
	})
	for _, o := range ops {
		t.Logf("%-14s %d", o.name, done[o.name].Load())
	}
}

// play plays one trial.
func play(t *testing.T, bin string, seed uint64, done map[string]*atomic.Int64) {
	w := &world{life: life{dir: t.TempDir(), bin: bin}, r: rand.New(rand.NewPCG(seed, 0))}
	var said []string
	err := trial.Run(func() {
		w.start()
		base := w.create(trial.Pick(w.r, kinds...), w.someSize())
		w.chain = []*layer{base}
		said = append(said, fmt.Sprintf("%s of %d bytes", base.kind, len(base.bytes)))
		w.open()
		if base.kind == "luks" {
			w.put(0, make([]byte, len(base.bytes)))
		}
		for i := range *flagOps {
			o := trial.Weighted(w.r, ops, func(o op) int { return o.weight })
			before := w.String()
			said = append(said, fmt.Sprintf("%d: %s, on %s", i, o.name, before))
			trial.In(o.name, func() { o.do(w); w.checkDisk() })
			done[o.name].Add(1)
		}
		w.stop(false)
		w.checkFiles(w.chain)
	})
	if err != nil {
		for _, s := range said {
			t.Log(s)
		}
		t.Errorf("seed %d: %v\n%s", seed, err, w.out.String())
	}
	if w.n != nil {
		w.n.Drop()
	}
	if w.proc != nil {
		w.proc.Kill()
		w.q.Close()
	}
}

// String is the chain, the base first.
func (w *world) String() (s string) {
	for _, l := range w.chain {
		s += fmt.Sprintf("%s %s(%d) ", l.node, l.kind, len(l.bytes))
	}
	return s
}
