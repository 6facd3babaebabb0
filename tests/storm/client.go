package storm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"qblockd/tests/daemon"
)

// client sends random commands.
type client struct {
	id      int
	socket  string
	limit   time.Duration // for one command
	g       gen
	h       *history
	log     *commandLog
	q       *daemon.QMP
	names   []string // of commands, as often as their weight
	done    map[string]int
	refused map[string]int
}

func (w *world) newClient(id int) *client {
	c := &client{id: id, socket: w.d.QMPSocket(), limit: w.c.limit, h: w.h, log: w.log,
		done: map[string]int{}, refused: map[string]int{}}
	c.g = gen{r: rand.New(rand.NewPCG(w.c.seed, uint64(id))), dir: w.dir}
	if id == 0 {
		c.g.larger = diskSize
	}
	for name := range generators {
		if w.c.only.MatchString(name) {
			c.names = append(c.names, slices.Repeat([]string{name}, max(weights[name], 1))...)
		}
	}
	slices.Sort(c.names)
	return c
}

// commandLog is what was said, for who looks into a failure.
type commandLog struct {
	mu   sync.Mutex
	text []byte // +checklocks:mu
}

func (l *commandLog) add(format string, a ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = fmt.Appendf(l.text, format+"\n", a...)
}

// leftAt tells whether a client left while its command was at the file of that path.
func (l *commandLog) leftAt(path string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for line := range bytes.Lines(l.text) {
		if bytes.Contains(line, []byte(" leaves after ")) && bytes.Contains(line, []byte(`"`+path+`"`)) {
			return true
		}
	}
	return false
}

func (c *client) run(stop <-chan struct{}) error {
	defer func() {
		if c.q != nil {
			c.q.Close()
		}
	}()
	if err := until(stop, c.step); err != nil {
		return fmt.Errorf("client %d: %w", c.id, err)
	}
	return nil
}

// until does steps until stop is closed, or one fails.
func until(stop <-chan struct{}, step func() error) error {
	for {
		select {
		case <-stop:
			return nil
		default:
		}
		if err := step(); err != nil {
			return err
		}
	}
}

// step sends one command. An error is one of the connection, or an answer that does not come.
func (c *client) step() (err error) {
	if c.q == nil {
		if c.q, err = daemon.DialQMP(c.socket, time.Now().Add(c.limit)); err != nil {
			return err
		}
	}
	name := c.names[c.g.r.IntN(len(c.names))]
	m := c.g.generate(name)
	m.name = name
	args, _ := json.Marshal(m.args)
	from := c.h.now()
	if c.g.one(100) {
		// Nobody waits for the answer. Queries change nothing.
		c.log.add("%.6f client %d leaves after %s %s", float64(from)/1e9, c.id, name, args)
		err := c.q.Send(name, anyArgs(m.args))
		c.q.Close()
		c.q = nil
		for obj, s := range m.steps {
			if s.what == "is" || s.what == "is there" {
				continue
			}
			s.ok = false
			c.h.add(c.id, obj, s, from, 0)
		}
		return err
	}
	c.q.SetDeadline(time.Now().Add(c.limit))
	reply, err := c.q.Do(name, anyArgs(m.args))
	to := c.h.now()
	c.q.Events = nil
	var refused *daemon.Error
	switch {
	case errors.As(err, &refused):
		c.refused[name]++
		c.log.add("%.6f %.6f client %d: %s %s: %s", float64(from)/1e9, float64(to)/1e9, c.id, name, args, refused.Desc)
		for obj, s := range m.texts[refused.Desc] {
			c.h.add(c.id, obj, s, from, to)
		}
	case err != nil:
		return fmt.Errorf("%s %s: %w", name, args, err)
	default:
		c.done[name]++
		c.log.add("%.6f %.6f client %d: %s %s: %.300s", float64(from)/1e9, float64(to)/1e9, c.id, name, args, reply)
		for obj, s := range m.steps {
			if s.what == "is" {
				if s.n, err = digested(reply); err != nil {
					return err
				}
			}
			c.h.add(c.id, obj, s, from, to)
		}
		if name == "query-named-block-nodes" {
			return c.sizes(reply, from, to)
		}
	}
	return nil
}

// sizes takes down what a query shows of sizes: one that was wrong for a while is not seen at the
// end.
func (c *client) sizes(reply json.RawMessage, from, to int64) error {
	var nodes []nodeInfo
	if err := json.Unmarshal(reply, &nodes); err != nil {
		return err
	}
	for _, n := range nodes {
		if slices.Contains(sized, n.Name) {
			c.log.add("%.6f %.6f client %d sees %s with %d", float64(from)/1e9, float64(to)/1e9, c.id, n.Name, n.Image.Size)
			c.h.add(c.id, "size "+n.Name, step{what: "is", n: n.Image.Size, ok: true}, from, to)
		}
	}
	return nil
}

func anyArgs(m M) any {
	if m == nil {
		return nil
	}
	return m
}

// digests are those of all that a bitmap of d1 can hold: source k has 1<<k granules, from granule
// 1<<k on.
var digests = sync.OnceValue(func() map[string]int64 {
	l := map[string]int64{}
	for mask := range int64(8) {
		var w uint64
		for k, n := range bits {
			if mask&n != 0 {
				w |= (1<<n - 1) << (1 << k)
			}
		}
		sum := sha256.Sum256(binary.LittleEndian.AppendUint64(nil, w))
		l[hex.EncodeToString(sum[:])] = mask
	}
	return l
})

func digested(reply json.RawMessage) (int64, error) {
	var r struct{ Sha256 string }
	if err := json.Unmarshal(reply, &r); err != nil {
		return 0, err
	}
	n, ok := digests()[r.Sha256]
	if !ok {
		return 0, fmt.Errorf("a bitmap of d1 holds what nobody has put there: digest %s", r.Sha256)
	}
	return n, nil
}
