package load

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// What docs/limits.md states.
const (
	crowd        = 1000 // half-open handshakes, and as many monitor clients
	prompt       = 50 * time.Millisecond
	perClient    = 32 << 10
	leftOver     = 16 << 20
	unsent       = 4 << 20 // qmp-unsent here
	hold         = 1 << 20 // qmp-hold, the default
	deaf         = 3
	stormEvents  = 100_000
	eventsPerJob = 7
)

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// eventually polls what another process brings about.
func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain: " + what)
		}
	}
}

// others are clients that work while the crowd is there, and measure how long they wait.
type others struct {
	t    testing.TB
	qmp  []*daemon.QMP
	nbd  []*daemon.NBD
	stop atomic.Bool
	wait sync.WaitGroup
	mu   sync.Mutex
	took map[string][]time.Duration
}

// sleeper is the yardstick: how late somebody is who does nothing but sleep.
const sleeper = "a sleeper's waking"

// wakings of a request that goes from a client's goroutine to the daemon's and back; each is as
// late as a sleeper's.
const wakings = 4

func newOthers(t testing.TB, d *daemon.Daemon) *others {
	o := &others{t: t}
	for range 2 {
		o.qmp = append(o.qmp, d.Dial(t))
		c, err := d.DialNBD("e")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Drop)
		o.nbd = append(o.nbd, c)
	}
	return o
}

// begin makes them work until end, and the yardstick beside them.
func (o *others) begin() {
	o.took = map[string][]time.Duration{}
	o.stop.Store(false)
	o.wait.Go(func() {
		for !o.stop.Load() {
			start := time.Now()
			time.Sleep(time.Millisecond)
			o.add(sleeper, time.Since(start)-time.Millisecond)
		}
	})
	for i := range o.qmp {
		o.loop("QMP round trip", func() error {
			_, err := o.qmp[i].Do("query-version", nil)
			o.qmp[i].Events = nil
			return err
		})
		buf := make([]byte, 4096)
		o.loop("NBD read", func() error { return o.nbd[i].ReadAt(buf, int64(i)<<20) })
	}
}

func (o *others) loop(what string, f func() error) {
	o.wait.Go(func() {
		for !o.stop.Load() {
			start := time.Now()
			if err := f(); err != nil {
				o.t.Errorf("%s: %v", what, err)
				return
			}
			o.add(what, time.Since(start))
			time.Sleep(time.Millisecond) // clients think between their requests
		}
	})
}

func (o *others) add(what string, took time.Duration) {
	o.mu.Lock()
	o.took[what] = append(o.took[what], took)
	o.mu.Unlock()
}

// end stops them and returns the worst of the 99th percentiles, and what it may be: on a machine
// that has better things to do even a sleeper is late, and the others so many times more.
func (o *others) end(when string) (worst, limit time.Duration) {
	o.stop.Store(true)
	o.wait.Wait()
	for what, l := range o.took {
		slices.Sort(l)
		p99 := l[len(l)*99/100]
		if what == sleeper {
			limit = prompt + wakings*p99
		} else {
			worst = max(worst, p99)
		}
		o.t.Logf("%s: %d x %s: median %v, p99 %v, worst %v", when, len(l), what, l[len(l)/2], p99, l[len(l)-1])
	}
	return worst, limit
}

// measured does f and requires that the others are served promptly meanwhile. A phase that can be
// repeated is, once.
func (o *others) measured(when string, again bool, f func()) { o.within(1, when, again, f) }

// within is measured with a limit that many times as high.
func (o *others) within(times time.Duration, when string, again bool, f func()) {
	o.begin()
	f()
	p99, limit := o.end(when)
	limit *= times
	if p99 > limit && again {
		o.begin()
		f()
		p99, limit = o.end(when + ", again")
		limit *= times
	}
	if p99 > limit {
		o.t.Errorf("%s: p99 %v, limit %v", when, p99, limit)
	}
}

// dial makes a connection that is closed at the end of the test.
func dial(t testing.TB, socket string) *net.UnixConn {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UnixConn)
}

// halfOpen are the beginnings of a handshake after which a client falls silent.
var halfOpen = []string{"", "\x00\x00", "\x00\x00\x00\x03", "\x00\x00\x00\x03IHAVEOPT\x00\x00\x00\x07\x00\x01\x00\x00half"}

// idle are what monitor clients send that then do nothing any more. None of them ever reads.
var idle = []string{"", `{"execute":"qmp_capabilities"}`, `{"execute":"qmp_capabilities"}{"execute":"query-`, "[[[[[[[["}

func start(t testing.TB, args ...string) *daemon.Daemon {
	return daemon.Start(t, t.TempDir(), append([]string{
		"--blockdev", "null-co,node-name=n,size=1073741824,read-zeroes=on", "--export", "nbd,id=e,node-name=n,name=e",
	}, args...)...)
}

// streams has jobs run that end at once, each with several events.
func streams(q *daemon.QMP, jobs int) error {
	const batch = 100
	for left := jobs; left > 0; left -= batch {
		n := min(batch, left)
		for range n {
			if err := q.Send("block-stream", map[string]any{"job-id": "j", "device": "n"}); err != nil {
				return err
			}
		}
		for range n {
			if err := q.Reply(); err != nil {
				return err
			}
		}
		q.Events = nil
	}
	return nil
}

// TestCrowd: a thousand half-open handshakes and a thousand monitor clients that do nothing are no
// hindrance to others, and nothing of them is left.
func TestCrowd(t *testing.T) {
	d := start(t, "--limit", "nbd-handshake=0,nbd-connections=2000")
	o, q := newOthers(t, d), d.Dial(t)
	o.measured("alone", true, func() { time.Sleep(500 * time.Millisecond) })
	fds, rss := d.FDs(t), d.RSS(t)

	var all []*net.UnixConn
	// Coming and going cannot be repeated, so one long pause of the machine must not decide.
	o.within(4, "while the crowd comes", false, func() {
		for i := range crowd {
			c := dial(t, d.NBDSocket())
			_, _ = io.WriteString(c, halfOpen[i%len(halfOpen)])
			m := dial(t, d.QMPSocket())
			_, _ = io.WriteString(m, idle[i%len(idle)])
			all = append(all, c, m)
			time.Sleep(time.Millisecond)
		}
		eventually(t, "all are accepted", func() bool { return d.FDs(t) >= fds+2*crowd })
	})
	o.measured("with the crowd", true, func() { time.Sleep(2 * time.Second) })
	o.measured("with the crowd, and events for it", true, func() {
		for range 20 {
			if err := streams(q, 3); err != nil {
				t.Error(err)
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
	most := d.RSS(t)
	t.Logf("RSS %s before, %s with %d idle connections: %d bytes each", mib(rss), mib(most), 2*crowd, (most-rss)/(2*crowd))
	if most-rss > 2*crowd*perClient {
		t.Errorf("that is more than %d each", perClient)
	}

	o.within(4, "while the crowd goes", false, func() {
		for _, c := range all {
			c.Close()
			time.Sleep(500 * time.Microsecond)
		}
		eventually(t, "descriptors are closed", func() bool { return d.FDs(t) == fds })
	})
	eventually(t, "memory is given back", func() bool { return d.RSS(t) <= rss+leftOver })
	t.Logf("RSS %s afterwards, %d descriptors as before", mib(d.RSS(t)), fds)
	d.Stop(t)
}

// TestStorm: clients that never read while a hundred thousand events are produced, and one that
// never reads its replies, are bounded and disconnected or held, and the others hear every event.
func TestStorm(t *testing.T) {
	d := start(t, "--limit", fmt.Sprintf("qmp-unsent=%d", unsent))
	o, q := newOthers(t, d), d.Dial(t)
	fds, rss := d.FDs(t), d.RSS(t)
	var never []*net.UnixConn
	for range deaf {
		c := dial(t, d.QMPSocket())
		if _, err := io.WriteString(c, `{"execute":"qmp_capabilities"}`); err != nil {
			t.Fatal(err)
		}
		never = append(never, c)
	}
	// One that has not negotiated hears no events: only its commands are held back.
	asker := dial(t, d.QMPSocket())
	_, _ = io.WriteString(asker, strings.Repeat(`{"execute":"query-version"}`, 1000))
	most := rss
	// The client that makes the storm keeps the daemon busy on all processors; the others get their
	// share.
	o.within(4, "during the storm", false, func() {
		for range 10 {
			if err := streams(q, stormEvents/eventsPerJob/10+1); err != nil {
				t.Fatal(err)
			}
			most = max(most, d.RSS(t))
		}
	})
	t.Logf("RSS %s before, at most %s", mib(rss), mib(most))
	// A buffer that grows is there twice for a moment, and the collector lets garbage of half the
	// heap gather.
	if bound := int64(deaf*3*unsent + 32<<20); most-rss > bound {
		t.Errorf("RSS grew by %s, limit %s", mib(most-rss), mib(bound))
	}
	for i, c := range never {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := io.Copy(io.Discard, c)
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			t.Errorf("client %d is still connected", i)
		}
		t.Logf("client %d was disconnected; %d bytes had been sent", i, n)
		c.Close()
	}
	asker.Close()
	eventually(t, "descriptors are closed", func() bool { return d.FDs(t) == fds })
	eventually(t, "memory is given back", func() bool { return d.RSS(t) <= rss+leftOver })
	t.Logf("RSS %s afterwards, %d descriptors as before", mib(d.RSS(t)), fds)
	d.Stop(t)
	logged := d.Stderr.String()
	if n := strings.Count(logged, "monitor client does not read, disconnecting it"); n != deaf || !strings.Contains(logged, fmt.Sprintf(`"so far":%d`, deaf)) {
		t.Errorf("%d of %d were logged and counted:\n%s", n, deaf, logged)
	}
}

// TestHeard: who reads during a storm hears every event, in order, and is not disconnected.
func TestHeard(t *testing.T) {
	d := start(t)
	q := d.Dial(t)
	c := dial(t, d.QMPSocket())
	r := bufio.NewReaderSize(c, 1<<20)
	_, _ = io.WriteString(c, `{"execute":"qmp_capabilities"}`)
	for range 2 {
		if _, err := r.ReadBytes('\n'); err != nil {
			t.Fatal(err)
		}
	}
	const jobs = 1000
	done := make(chan error, 1)
	go func() { done <- streams(q, jobs) }()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	order := []string{"created", "running", "waiting", "pending", "", "concluded", "null"}
	for i := range jobs * eventsPerJob {
		line, err := r.ReadBytes('\n')
		if err != nil {
			t.Fatalf("event %d: %v", i, err)
		}
		var e struct{ Data struct{ Status string } }
		if err := json.Unmarshal(line, &e); err != nil || e.Data.Status != order[i%eventsPerJob] {
			t.Fatalf("event %d is %s", i, line)
		}
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}
