package hostile

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"qblockd/tests/daemon"
)

var (
	flagCases     = flag.Int("hostile.cases", 0, "number of cases; 0: as many as -hostile.time allows")
	flagTime      = flag.Duration("hostile.time", 40*time.Second, "time to stop after, if -hostile.cases is not given")
	flagSeed      = flag.Uint64("hostile.seed", 1, "seed")
	flagFrom      = flag.Int("hostile.from", 0, "first case")
	flagCase      = flag.Int("hostile.case", -1, "the one case to run")
	flagMatch     = flag.String("hostile.match", "", "run only cases whose description matches")
	flagBinary    = flag.String("hostile.binary", "", "daemon to hunt in, instead of one built from this tree")
	flagWorkers   = flag.Int("hostile.workers", 2, "daemons at a time")
	flagMemory    = flag.Int64("hostile.memory", 512, "MiB that a daemon may have resident")
	flagSpace     = flag.Int64("hostile.space", 3072, "MiB of address space of a daemon")
	flagDeadline  = flag.Duration("hostile.deadline", 20*time.Second, "longest wait for an answer")
	flagPatience  = flag.Duration("hostile.patience", 5*time.Second, "how long a client waits for a command before it leaves")
	flagReference = flag.Bool("hostile.reference", false, "compare what is read with what qemu-img reads")
	flagKeep      = flag.Int("hostile.keep", 3, "failures of each kind that are shown and kept")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// hunt is a run over many cases.
type hunt struct {
	t     *testing.T
	cases *CasesOf
	kept  string

	mu    sync.Mutex
	kinds map[string][]int // numbers of the cases that failed
	did   map[string]int   // what cases did, and how often
	peak  int64
}

func (h *hunt) count(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.did == nil {
		h.did = map[string]int{}
	}
	h.did[what]++
}

// TestHunt runs cases on daemons, each of which serves many.
func TestHunt(t *testing.T) {
	bin := *flagBinary
	if bin == "" {
		bin = daemon.Binary(t)
	}
	kept, err := os.MkdirTemp("", "qblockd-hostile-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(kept) }) // stays if there is something in it
	h := &hunt{t: t, cases: NewCases(*flagSeed, Names(imageName)), kept: kept, kinds: map[string][]int{}}
	first, last := *flagFrom, *flagFrom+*flagCases
	end := time.Time{}
	switch {
	case *flagCase >= 0:
		first, last = *flagCase, *flagCase+1
	case *flagCases == 0:
		last = 1 << 40
		end = time.Now().Add(*flagTime)
	}
	match := regexp.MustCompile(*flagMatch)
	began := time.Now()
	var next, done atomic.Int64
	next.Store(int64(first))
	var wait sync.WaitGroup
	for range *flagWorkers {
		wait.Go(func() {
			w := &worker{h: h, bin: bin, dir: scratch(t)}
			defer w.end()
			for {
				n := int(next.Add(1) - 1)
				if n >= last || !end.IsZero() && time.Now().After(end) {
					return
				}
				if c := h.cases.Case(n); !match.MatchString(c.String()) {
					continue
				} else if !w.one(c) {
					return
				}
				done.Add(1)
			}
		})
	}
	wait.Wait()
	t.Logf("seed %d: %d cases from %d on, %d of one damage each in all; %v, %.1f cases/s; at most %d MiB resident", *flagSeed, done.Load(), first,
		h.cases.Singles(), time.Since(began).Round(time.Second), float64(done.Load())/time.Since(began).Seconds(), h.peak>>20)
	h.report()
}

// report lists what was done and the kinds of failures.
func (h *hunt) report() {
	var did []string
	for _, what := range slices.Sorted(maps.Keys(h.did)) {
		did = append(did, fmt.Sprintf("%s %d", what, h.did[what]))
	}
	h.t.Log(strings.Join(did, ", "))
	var kinds []string
	for k := range h.kinds {
		kinds = append(kinds, k)
	}
	slices.SortFunc(kinds, func(a, b string) int { return len(h.kinds[b]) - len(h.kinds[a]) })
	for _, k := range kinds {
		l := h.kinds[k]
		slices.Sort(l)
		h.t.Errorf("%5d x %s; cases %v", len(l), k, l[:min(len(l), 8)])
	}
}

// worker runs cases one after the other on a daemon of its own.
type worker struct {
	h   *hunt
	bin string
	dir string
	s   *server
}

// scratch is a folder in memory, where there is such a place: flushing to a disk would be most of
// the time.
func scratch(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "qblockd-hostile-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func (w *worker) end() {
	if w.s != nil && !w.s.quit() {
		w.h.found(&Case{Number: -1, Base: &Base{}}, nil, &Failure{"the daemon does not end in order", w.s.said(), true}, "")
	}
}

// one runs a case and tells whether to go on. One that was too slow has another go, as the machine
// may be busy with something else, and one that took too much memory, as the garbage of those
// before may be among it.
func (w *worker) one(c *Case) bool {
	var trace []string
	var f *Failure
	for try := range 2 {
		if w.s == nil {
			l := Limits{*flagMemory << 20, *flagSpace << 20, *flagDeadline, *flagPatience, *flagReference}
			s, err := newServer(w.bin, w.dir, l)
			if err != nil {
				w.h.t.Error(err)
				return false
			}
			w.s = s
			s.count = w.h.count
		}
		trace, f = Run(w.s, c, *flagSeed)
		w.h.mu.Lock()
		w.h.peak = max(w.h.peak, w.s.peak())
		w.h.mu.Unlock()
		if *flagCase >= 0 {
			w.h.t.Logf("%v\n%s", c, strings.Join(trace, "\n"))
		}
		if f == nil {
			return true
		}
		slow := strings.HasPrefix(f.Kind, "no ") || strings.HasPrefix(f.Kind, "the other disk") || f.Kind == "a job does not end" || f.Kind == "memory"
		again := slow && try == 0
		if again {
			w.h.t.Logf("%v: %v; once more", c, f)
		} else {
			w.h.found(c, trace, f, w.s.work())
		}
		// What it left behind would be taken for the next case's.
		w.s.kill()
		w.s = nil
		if !again {
			break
		}
	}
	return true
}

// found notes, shows and keeps a failure.
func (h *hunt) found(c *Case, trace []string, f *Failure, dir string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kinds[f.Kind] = append(h.kinds[f.Kind], c.Number)
	if len(h.kinds[f.Kind]) > *flagKeep && *flagCase < 0 {
		return
	}
	where := filepath.Join(h.kept, fmt.Sprint(c.Number))
	if dir != "" {
		if err := os.MkdirAll(where, 0o700); err != nil {
			h.t.Error(err)
		}
		if err := c.Base.WriteTo(filepath.Join(where, imageName), c.Damages...); err != nil {
			h.t.Error(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, imageName)); err == nil && len(b) < 64<<20 {
			_ = os.WriteFile(filepath.Join(where, "after.qcow2"), b, 0o600)
		}
	}
	text := f.Text
	if len(text) > 3000 {
		text = text[:3000] + "..."
	}
	h.t.Errorf("%s\n%v\nagain with -hostile.seed=%d -hostile.case=%d; the image is in %s\nwhat was done:\n%s\n%s", f.Kind, c, *flagSeed, c.Number, where,
		strings.Join(trace, "\n"), text)
}
