package geometry

import (
	"flag"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"qblockd/schema/types"
)

var (
	flagSamples = flag.Int("geometry.samples", 250, "number of samples")
	flagSeed    = flag.Uint64("geometry.seed", 1, "seed of the first")
	flagTries   = flag.Int("geometry.tries", 1, "how often each is played")
	flagOnly    = flag.String("geometry.only", "", "play only samples whose line has this text")
	flagFails   = flag.Int("geometry.fails", 10, "failures after which no more are played")
	flagLimit   = flag.Duration("geometry.limit", 30*time.Second, "longest time in which nothing happens in one")
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestHugeSteps: what fills a huge disk with zeroes, as there is something below, does so in large
// steps.
func TestHugeSteps(t *testing.T) {
	if s := Draw(407624); !s.Huge || s.Kind != "mirror" || s.Under != "own" || s.BufSize != 64<<20 {
		t.Errorf("%v", s)
	}
	if s := Draw(600914); !s.Huge || s.Kind != "backup" || s.Under != "own" || s.Chunk != 64<<20 {
		t.Errorf("%v", s)
	}
	for seed := range uint64(20000) {
		s := Draw(seed)
		small := 0 < s.BufSize && s.BufSize < 16<<20 ||
			s.Sync == types.MirrorSyncModeFull && 0 < s.Chunk && s.Chunk < 16<<20
		if s.Huge && s.Under != "" && small {
			t.Fatalf("%v", s)
		}
	}
}

// TestSamples plays samples of many seeds.
func TestSamples(t *testing.T) {
	var next, failed atomic.Int64
	var mu sync.Mutex
	kinds, refused, failures := map[string]int{}, map[string]int{}, map[string]int{}
	struck, killed, huge := 0, 0, 0
	longest, most := Sample{}, int64(0)
	begin := time.Now()
	var wg sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= *flagSamples**flagTries || failed.Load() >= int64(*flagFails) {
					return
				}
				s := Draw(*flagSeed + uint64(i / *flagTries))
				if !strings.Contains(s.String(), *flagOnly) {
					continue
				}
				o, err := Run(s, *flagLimit)
				mu.Lock()
				kinds[s.Kind]++
				if o.Refused != "" {
					refused[o.Refused]++
				}
				if o.Failed != "" {
					failures[o.Failed]++
				}
				if o.Struck {
					struck++
				}
				if o.Killed {
					killed++
				}
				if s.Huge {
					huge++
				}
				if o.Moves > most {
					longest, most = s, o.Moves
				}
				mu.Unlock()
				if err != nil {
					failed.Add(1)
					t.Errorf("%v\n%v", s, err)
				}
			}
		})
	}
	wg.Wait()
	t.Logf("seeds from %d: %v in %v; refused %v; failed %v; an I/O failed in %d, killed %d; huge disks in %d; the longest is %d, with %d requests",
		*flagSeed, kinds, time.Since(begin), refused, failures, struck, killed, huge, longest.Seed, most)
}
