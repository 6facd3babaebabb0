package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"qblockd/blockdev/export"
	"qblockd/blockdev/nbdwire"
	"qblockd/schema/types"
)

// told are the errors that an export has told of.
type told struct {
	mu  sync.Mutex
	log []string
}

func (l *told) tell(op types.IoOperationType, a types.BlockErrorAction, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.log = append(l.log, fmt.Sprint(op, " ", a, ": ", err))
}

func (l *told) take() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	log := l.log
	l.log = nil
	return log
}

// failing is a device whose operations fail with what err is at the time, reading not for lack of
// space, and an export with the same policy for all of them.
func failing(
	t *testing.T, p types.BlockdevOnError,
) (*fileDevice, *atomic.Pointer[error], *export.Errors, *told, string) {
	t.Helper()
	d := newFileDevice(t, 1<<20)
	var err atomic.Pointer[error]
	d.fault = func(op string) error {
		if e := err.Load(); e != nil && (op != "read" && op != "status" || *e != syscall.ENOSPC) {
			return *e
		}
		return nil
	}
	l := &told{}
	errs := export.NewErrors(&p, &p, l.tell)
	_, _, path := server(t, d, Options{}, func(s *Spec) { s.Errors = errs })
	return d, &err, errs, l, path
}

// TestErrorPolicies: what clients get and what is told, for requests of all kinds.
func TestErrorPolicies(t *testing.T) {
	for _, c := range []struct {
		policy types.BlockdevOnError
		err    error
		errno  uint32 // of the reply; reads may differ
		action string
	}{
		{types.BlockdevOnErrorReport, syscall.EIO, nbdwire.EIO, "report"},
		{types.BlockdevOnErrorReport, syscall.ENOSPC, nbdwire.ENOSPC, "report"},
		{types.BlockdevOnErrorEnospc, syscall.EIO, nbdwire.EIO, "report"},
		{types.BlockdevOnErrorAuto, syscall.EIO, nbdwire.EIO, "report"},
		{types.BlockdevOnErrorIgnore, syscall.EIO, 0, "ignore"},
	} {
		d, fail, _, l, path := failing(t, c.policy)
		for i := range 6 {
			d.wouldBlock.Store(i&1 != 0)
			cl := open(t, path, nbdwire.Form(i>>1))
			data := bytes.Repeat([]byte{0x5a}, 8192)
			fail.Store(nil)
			cl.do(wr(0, 8192), data...)
			fail.Store(&c.err)
			for _, q := range []nbdwire.Request{
				rd(0, 8192), rd(0, 256<<10), wr(0, 8192), req(nbdwire.CmdFlush, 0, 0, nil),
				req(nbdwire.CmdTrim, 0, 4096, nil), req(nbdwire.CmdWriteZeroes, 0, 4096, nil), rd(0, 0),
			} {
				op := "write"
				var payload []byte
				switch q.Cmd {
				case nbdwire.CmdRead:
					op = "read"
				case nbdwire.CmdWrite:
					payload = data
				}
				a := cl.do(q, payload...)
				want := fmt.Sprint(op, " ", c.action, ": ", c.err)
				errno := c.errno
				if q.Cmd == nbdwire.CmdRead && (q.Len == 0 || c.err == syscall.ENOSPC) {
					want, errno = "", 0
				}
				log := l.take()
				if a.errno != errno || want != "" && (len(log) != 1 || log[0] != want) || want == "" && log != nil {
					t.Errorf("%s, %v, command %d: errno %d, told %q", c.policy, c.err, q.Cmd, a.errno, log)
				}
				if want != "" && q.Cmd == nbdwire.CmdRead && a.errno == 0 && bytes.Contains(a.data, []byte{0x5a}) {
					t.Errorf("%s: a failed read shows data", c.policy)
				}
			}
		}
	}
}

// TestAnswersAreNoErrors: what cannot be done fast is told to the client whatever the policy.
func TestAnswersAreNoErrors(t *testing.T) {
	_, fail, _, l, path := failing(t, types.BlockdevOnErrorStop)
	c := open(t, path, nbdwire.Structured)
	err := error(syscall.EOPNOTSUPP)
	fail.Store(&err)
	if a := c.do(req(nbdwire.CmdWriteZeroes, 0, 4096, []uint16{nbdwire.CmdFlagFastZero})); a.errno != nbdwire.ENOTSUP {
		t.Errorf("errno %d", a.errno)
	}
	if log := l.take(); log != nil {
		t.Errorf("told %q", log)
	}
}

// TestStopAndResume: an error stops all clients, without holding up a drain; afterwards all of
// their requests succeed.
func TestStopAndResume(t *testing.T) {
	for _, policy := range []types.BlockdevOnError{
		types.BlockdevOnErrorStop, types.BlockdevOnErrorEnospc, types.BlockdevOnErrorAuto,
	} {
		d, fail, errs, l, path := failing(t, policy)
		a, b := open(t, path, nbdwire.Structured), open(t, path, nbdwire.Simple)
		full := error(syscall.ENOSPC)
		fail.Store(&full)
		data := bytes.Repeat([]byte{7}, 4096)
		for i := range uint64(40) { // more than there are workers
			q := wr(i*4096, 4096)
			q.Cookie = i
			a.put(append(q.Append(nil), data...))
		}
		eventually(t, "it is stopped", func() bool { return errs.Stopped() != nil })
		if s := *errs.Status(); s != types.BlockDeviceIoStatusNospace {
			t.Errorf("status %s", s)
		}
		q := rd(0, 4096)
		b.put(q.Append(nil))
		// A second failure, then space: the first try after it goes well.
		errs.Resume()
		eventually(t, "it is stopped again", func() bool { return errs.Stopped() != nil })
		eventually(t, "nobody is inside", func() bool { return d.inside.Load() == 0 })
		if log := l.take(); len(log) != 2 || log[0] != "write stop: "+full.Error() {
			t.Errorf("told %q", log)
		}
		fail.Store(nil)
		if !errs.Resume() {
			t.Error("not stopped")
		}
		for range 40 {
			h := a.peekCookie()
			if x := a.reply(nbdwire.Request{Cmd: nbdwire.CmdWrite, Cookie: h}); x.errno != 0 {
				t.Errorf("%d: errno %d", h, x.errno)
			}
		}
		if x := b.reply(q); x.errno != 0 {
			t.Errorf("errno %d", x.errno)
		}
		got := make([]byte, 40*4096)
		if _, err := d.f.ReadAt(got, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, len(got))) {
			t.Errorf("lost: %v", err)
		}
		if errs.Resume() || *errs.Status() != types.BlockDeviceIoStatusOk {
			t.Error("still stopped")
		}
	}
}

// TestClientGoneWhileStopped: the connection of a client that hangs up ends although nobody
// resumes, also if it had asked for more than is taken from it.
func TestClientGoneWhileStopped(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	var healed atomic.Bool
	d.fault = func(string) error {
		if healed.Load() {
			return nil
		}
		return syscall.EIO
	}
	p := types.BlockdevOnErrorStop
	errs := export.NewErrors(&p, nil, (&told{}).tell)
	s, _, path := server(t, d, Options{Inflight: 2}, func(s *Spec) { s.Errors = errs })
	c := open(t, path, nbdwire.Structured)
	for range 20 {
		q := rd(0, 4096)
		c.put(q.Append(nil))
	}
	eventually(t, "it is stopped", func() bool { return errs.Stopped() != nil })
	other := open(t, path, nbdwire.Structured)
	q := rd(0, 4096)
	other.put(q.Append(nil))
	c.nc.Close()
	eventually(t, "it is gone", func() bool { return s.count() == 1 })
	healed.Store(true)
	errs.Resume()
	if x := other.reply(q); x.errno != 0 {
		t.Errorf("errno %d", x.errno)
	}
	if d.inside.Load() != 0 {
		t.Error("somebody is inside")
	}
}

// TestStoppedRemoval: an export that is stopped is removed at once, the requests unanswered.
func TestStoppedRemoval(t *testing.T) {
	d := newFileDevice(t, 1<<20)
	d.fault = func(string) error { return syscall.EIO }
	p := types.BlockdevOnErrorStop
	errs := export.NewErrors(&p, &p, (&told{}).tell)
	_, e, path := server(t, d, Options{}, func(s *Spec) { s.Errors = errs })
	c := open(t, path, nbdwire.Structured)
	q := rd(0, 4096)
	c.put(q.Append(nil))
	eventually(t, "it is stopped", func() bool { return errs.Stopped() != nil })
	promptly(t, "Shutdown", e.Shutdown)
	if b, _ := io.ReadAll(c.r); len(b) > 0 && (len(b) < 24 || binary.BigEndian.Uint32(b[20:]) != nbdwire.ESHUTDOWN) {
		t.Errorf("answered: %x", b)
	}
	<-e.Done()
}

// TestErrorsOfNoPolicy: without one nothing is told.
func TestErrorsOfNoPolicy(t *testing.T) {
	if export.NewErrors(nil, nil, nil) != nil {
		t.Error("there are some")
	}
	var none *export.Errors
	if a := none.Decide(types.IoOperationTypeRead, errors.New("x"), 0); a != types.BlockErrorActionReport {
		t.Error(a)
	}
	if none.Resume() || none.Status() != nil || none.Stopped() != nil {
		t.Error("it was stopped")
	}
}

// TestErrorFromBefore: a request that failed before the export was resumed is carried out again,
// and does not stop it once more.
func TestErrorFromBefore(t *testing.T) {
	p := types.BlockdevOnErrorStop
	l := &told{}
	errs := export.NewErrors(&p, &p, l.tell)
	before := errs.Resumes()
	decide := func(resumes uint64) {
		t.Helper()
		if a := errs.Decide(types.IoOperationTypeWrite, syscall.EIO, resumes); a != types.BlockErrorActionStop {
			t.Errorf("%s", a)
		}
	}
	decide(before)
	errs.Resume()
	decide(before)
	if errs.Stopped() != nil {
		t.Error("it is stopped once more")
	}
	decide(errs.Resumes())
	if log := l.take(); errs.Stopped() == nil || len(log) != 2 {
		t.Errorf("it is not stopped, or %q was told", log)
	}
}
