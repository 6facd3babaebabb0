package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var daemons = []string{us, qsd}

func (b *bench) duration() time.Duration { return time.Duration(b.secs * 1e9) }

// startLoads: from exec to the greeting, and what a daemon takes that does nothing.
func startLoads(b *bench) *group {
	return &group{name: "start", sides: daemons, loads: []load{
		single("start to greeting", "ms", true, func(side string) (float64, error) {
			var all []float64
			for range 3 {
				ms, err := b.greeting(side)
				if err != nil {
					return 0, err
				}
				all = append(all, ms)
			}
			return median(all), nil
		}),
		single("RSS idle", "MiB", true, func(side string) (float64, error) {
			p, err := b.daemon(side, 1)
			if err != nil {
				return 0, err
			}
			defer b.stop(p)
			kib, err := p.settled()
			return kib / 1024, err
		}).most(3),
	}}
}

// greeting starts a daemon with its monitor on stdio and returns how long its greeting took, in
// milliseconds.
func (b *bench) greeting(side string) (float64, error) {
	cmd := exec.CommandContext(b.ctx, b.program(side), "--chardev", "stdio,id=c", "--monitor", "chardev=c")
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	line, err := bufio.NewReader(out).ReadBytes('\n')
	took := time.Since(begin)
	if err == nil && !bytes.Contains(line, []byte(`"QMP"`)) {
		err = fmt.Errorf("no greeting but %q", line)
	}
	_, werr := io.WriteString(in, "{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"quit\"}\n")
	io.Copy(io.Discard, out)
	return took.Seconds() * 1e3, errors.Join(err, werr, cmd.Wait())
}

// settled is the resident memory in KiB when it no longer shrinks, looked at for up to a second.
func (p *proc) settled() (float64, error) {
	low, err := p.rss()
	for range 4 {
		if err != nil {
			break
		}
		time.Sleep(200 * time.Millisecond)
		var x float64
		x, err = p.rss()
		low = min(low, x)
	}
	return low, err
}

// monitorLoads: monitors of an otherwise idle daemon.
func monitorLoads(b *bench) *group {
	up := map[string]*proc{}
	ms := map[string][]*monitor{}
	version := command("query-version", nil)
	g := &group{name: "qmp", sides: daemons}
	g.setUp = func(side string) (err error) {
		if up[side], err = b.daemon(side, 8, "--blockdev", "driver=null-co,node-name=n,size=1048576"); err != nil {
			return err
		}
		for i := range 8 {
			m, err := dialMonitor(up[side].mon[i])
			if err != nil {
				return err
			}
			ms[side] = append(ms[side], m)
		}
		return nil
	}
	g.down = func() {
		for _, l := range ms {
			for _, m := range l {
				m.close()
			}
		}
	}
	const name = "query-version round trip"
	g.loads = []load{
		{name: name, metrics: []metric{{name + " p50", "us", true}, {name + " p99", "us", true}}, run: func(side string) ([]float64, error) {
			t, err := ms[side][0].roundTrips(version, b.duration())
			if err != nil {
				return nil, err
			}
			return []float64{t[len(t)/2], t[len(t)*99/100]}, nil
		}},
		single("10k pipelined", "cmd/s", false, func(side string) (float64, error) {
			return ms[side][0].pipelined(version, 10000)
		}).most(5),
		single("8 monitors", "cmd/s", false, func(side string) (float64, error) {
			var wg sync.WaitGroup
			var total atomic.Int64
			errs := make([]error, 8)
			begin := time.Now()
			for i, m := range ms[side] {
				wg.Go(func() {
					t, err := m.roundTrips(version, b.duration())
					total.Add(int64(len(t)))
					errs[i] = err
				})
			}
			wg.Wait()
			return float64(total.Load()) / time.Since(begin).Seconds(), errors.Join(errs...)
		}),
	}
	return g
}

const manyNodes = 10000

func addNull(name string) []byte {
	return command("blockdev-add", object{"driver": "null-co", "node-name": name, "size": 1 << 30})
}

func del(name string) []byte { return command("blockdev-del", object{"node-name": name}) }

// graphLoads: one daemon with 10 nodes and one with 10,000.
func graphLoads(b *bench) *group {
	few, many := map[string]*proc{}, map[string]*proc{}
	perNode := map[string]float64{}
	g := &group{name: "graph", sides: daemons}
	fill := func(p *proc, n int) error {
		var cmds [][]byte
		for i := range n {
			cmds = append(cmds, addNull(fmt.Sprintf("n%d", i)))
		}
		_, err := p.q.sequence(cmds)
		return err
	}
	g.setUp = func(side string) (err error) {
		if few[side], err = b.daemon(side, 0); err != nil {
			return err
		}
		if err = fill(few[side], 10); err != nil {
			return err
		}
		if many[side], err = b.daemon(side, 0); err != nil {
			return err
		}
		before, err := many[side].settled()
		if err != nil {
			return err
		}
		if err = fill(many[side], manyNodes); err != nil {
			return err
		}
		after, err := many[side].settled()
		perNode[side] = (after - before) / manyNodes
		return err
	}
	add := func(p *proc) (float64, error) {
		var adds, dels [][]byte
		for i := range 100 {
			name := fmt.Sprintf("more%d", i)
			adds, dels = append(adds, addNull(name)), append(dels, del(name))
		}
		us, err := p.q.sequence(adds)
		if err == nil {
			_, err = p.q.sequence(dels)
		}
		return us, err
	}
	g.loads = []load{
		known("RSS a node", "KiB", perNode),
		{name: "blockdev-add", metrics: []metric{{"blockdev-add with 10 nodes", "us", true}, {"blockdev-add with 10,000 nodes", "us", true},
			{"10,000 nodes against 10", "x", true}}, run: func(side string) ([]float64, error) {
			f, err := add(few[side])
			if err != nil {
				return nil, err
			}
			m, err := add(many[side])
			return []float64{f, m, m / f}, err
		}},
		single("flat query of 10,000 nodes", "ms", true, func(side string) (float64, error) { return many[side].query(true) }),
	}
	return g
}

// query is how long query-named-block-nodes takes, in milliseconds.
func (p *proc) query(flat bool) (float64, error) {
	begin := time.Now()
	_, err := p.q.do("query-named-block-nodes", object{"flat": flat})
	return time.Since(begin).Seconds() * 1e3, err
}

// chainLoads: 200 layers of qcow2. With override the headers name no backing file: the options do,
// and every file name the daemon tells is made of all layers below.
func chainLoads(b *bench, headers bool) *group {
	const depth = 200
	g := &group{name: "chain", sides: daemons}
	if !headers {
		g.name = "chain override"
	}
	dir := func() string { return filepath.Join(b.shm, "chain") }
	file := func(i int) string { return filepath.Join(dir(), fmt.Sprint(i)) }
	g.ready = func() error {
		if err := os.Mkdir(dir(), 0o777); err != nil {
			return err
		}
		return b.newChain(file, depth, headers)
	}
	g.down = func() { os.RemoveAll(dir()) }
	up := map[string]*proc{}
	perLayer := map[string]float64{}
	g.setUp = func(side string) (err error) {
		if up[side], err = b.daemon(side, 0); err != nil {
			return err
		}
		before, err := up[side].settled()
		if err != nil {
			return err
		}
		for i := range depth {
			o := object{"driver": "qcow2", "node-name": fmt.Sprintf("q%d", i), "read-only": true, "backing": nil,
				"file": object{"driver": "file", "filename": file(i), "read-only": true}}
			if i > 0 {
				o["backing"] = fmt.Sprintf("q%d", i-1)
			}
			if _, err := up[side].q.do("blockdev-add", o); err != nil {
				return err
			}
		}
		after, err := up[side].settled()
		perLayer[side] = (after - before) / depth
		return err
	}
	least := targetOf(g.name+"/full query", qsd)
	limit, enough := time.Minute, 15*time.Second
	if b.quick {
		enough = 6 * time.Second
	}
	g.loads = []load{
		known("RSS a layer", "KiB", perLayer),
		single("full query", "ms", true, func(side string) (float64, error) {
			v, err := b.fullQuery(up[side], limit)
			if side == us && err == nil {
				// Longer than this decides nothing.
				limit = max(enough, time.Duration(1.1*least*v*float64(time.Millisecond)))
			}
			return v, err
		}).most(3),
	}
	return g
}

// newChain makes files of empty images, file(i) for i < depth. With headers each names the one
// before as its backing file.
func (b *bench) newChain(file func(int) string, depth int, headers bool) error {
	if err := b.newQcow2(file(0), 64<<20); err != nil {
		return err
	}
	empty, err := os.ReadFile(file(0))
	if err != nil {
		return err
	}
	for i := 1; i < depth; i++ {
		layer := empty
		if headers {
			layer = withBacking(empty, file(i-1))
		}
		if err := os.WriteFile(file(i), layer, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// fullQuery is query with whole chains. Who takes longer than limit is taken to need just that, and
// is killed.
func (b *bench) fullQuery(p *proc, limit time.Duration) (float64, error) {
	if p.Ended(0) {
		return limit.Seconds() * 1e3, nil
	}
	if err := p.q.fd.timeout(limit); err != nil {
		return 0, err
	}
	v, err := p.query(false)
	if errors.Is(err, syscall.EAGAIN) {
		fmt.Printf("    %s needs more than %v and counts as that\n", p.side, limit)
		p.Kill()
		return limit.Seconds() * 1e3, nil
	}
	return v, err
}

// job runs the command of a job to the end of that.
func (p *proc) job(command string, args object) (time.Duration, error) {
	args["job-id"], args["auto-dismiss"] = "j", false
	begin := time.Now()
	if _, err := p.q.do(command, args); err != nil {
		return 0, err
	}
	for {
		b, err := p.q.do("query-jobs", nil)
		if err != nil {
			return 0, err
		}
		if bytes.Contains(b, []byte(`"concluded"`)) {
			took := time.Since(begin)
			if i := bytes.Index(b, []byte(`"error":`)); i >= 0 {
				return took, fmt.Errorf("job failed: %s", b[i:])
			}
			return took, nil
		}
		time.Sleep(time.Millisecond)
	}
}
