package meta

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

var (
	flagSeeds  = flag.Int("meta.seeds", 50, "number of seeds")
	flagOps    = flag.Int("meta.ops", 120, "operations of each seed")
	flagSeed   = flag.Uint64("meta.seed", 1, "first seed")
	flagReplay = flag.String("meta.replay", "", "file with operations to run instead")
	flagLimit  = flag.Duration("meta.limit", time.Minute, "longest time of a run")
	flagTries  = flag.Int("meta.tries", 300, "runs to reduce a failing one by")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// config is how seed runs: every fourth on real files.
func config(t *testing.T, seed uint64, dir string) Config {
	_, err := exec.LookPath("qemu-img")
	if err != nil {
		t.Log("SKIPPED: qemu-img is not installed and does not check the images")
	}
	return Config{Dir: dir, RealFiles: seed%4 == 0, QemuImg: err == nil, Limit: *flagLimit}
}

// in runs operations in a directory that is removed.
func in(t *testing.T, seed uint64, ops []Op) ([]string, error) {
	dir, err := os.MkdirTemp("", "meta")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	return Run(ops, config(t, seed, dir))
}

// TestRandom runs the operations of many seeds. Those of a failing one are kept, reduced and
// printed.
func TestRandom(t *testing.T) {
	if *flagReplay != "" {
		t.Skip("replaying")
	}
	kept, err := os.MkdirTemp("", "qblockd-meta-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(kept) }) // stays if there is something in it
	t.Logf("seeds %d to %d, %d operations each; failing ones in %s", *flagSeed, *flagSeed+uint64(*flagSeeds)-1, *flagOps, kept)
	for i := range *flagSeeds {
		seed := *flagSeed + uint64(i)
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			t.Parallel()
			ops := Generate(seed, *flagOps)
			// Written first: it outlives a crash of the process.
			file := filepath.Join(kept, fmt.Sprintf("seed-%d.ops", seed))
			if err := os.WriteFile(file, []byte(Format(ops)), 0o600); err != nil {
				t.Fatal(err)
			}
			trace, err := in(t, seed, ops)
			if err == nil {
				_ = os.Remove(file)
				return
			}
			report(t, seed, file, trace, err)
			if strings.Contains(err.Error(), "hangs") {
				return // and leaves goroutines behind; more of them help nobody
			}
			end := time.Now().Add(time.Minute)
			small := Reduce(ops, *flagTries, func(ops []Op) bool {
				if time.Now().After(end) {
					return false
				}
				_, err := in(t, seed, ops)
				return err != nil
			})
			file = strings.TrimSuffix(file, ".ops") + "-reduced.ops"
			if werr := os.WriteFile(file, []byte(fmt.Sprintf("# seed %d\n%s", seed, Format(small))), 0o600); werr != nil {
				t.Fatal(werr)
			}
			trace, err = in(t, seed, small)
			report(t, seed, file, trace, err)
			t.Logf("the %d operations left:\n%s", len(small), Format(small))
		})
	}
}

func report(t *testing.T, seed uint64, file string, trace []string, err error) {
	t.Helper()
	t.Errorf("seed %d: %v\nagain with -meta.replay=%s -meta.seed=%d; what was done:\n%s",
		seed, err, file, seed, strings.Join(trace, "\n"))
}

// TestReplay runs operations that were kept, with the configuration of -meta.seed.
func TestReplay(t *testing.T) {
	if *flagReplay == "" {
		t.Skip("no -meta.replay")
	}
	text, err := os.ReadFile(*flagReplay)
	if err != nil {
		t.Fatal(err)
	}
	ops, err := Parse(string(text))
	if err != nil {
		t.Fatal(err)
	}
	trace, err := in(t, *flagSeed, ops)
	if err != nil {
		report(t, *flagSeed, *flagReplay, trace, err)
	}
}

// TestReduce: what is left is what matters.
func TestReduce(t *testing.T) {
	ops := Generate(1, 200)
	need := []Op{ops[17], ops[93], ops[94]}
	left := Reduce(ops, 1000, func(l []Op) bool {
		k := 0
		for _, o := range l {
			if k < len(need) && o == need[k] {
				k++
			}
		}
		return k == len(need)
	})
	if Format(left) != Format(need) {
		t.Errorf("left:\n%s", Format(left))
	}
	if again, err := Parse("# comment\n\n" + Format(ops)); err != nil || Format(again) != Format(ops) {
		t.Errorf("parsed: %v", err)
	}
	if _, err := Parse("swim 1 2 3 4 5"); err == nil {
		t.Error("an unknown operation was read")
	}
}
