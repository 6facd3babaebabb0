package load

import (
	"bufio"
	"bytes"
	"flag"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

var starts = flag.Int("load.starts", 100, "daemons that are started with a client at the door")

// TestStarts connects while the daemon starts: whoever gets a connection gets a greeting and an
// answer.
func TestStarts(t *testing.T) {
	bin := daemon.Binary(t)
	var next, refused atomic.Int64
	var workers sync.WaitGroup
	var mu sync.Mutex
	var slowest time.Duration
	for range 2 {
		dir := t.TempDir()
		workers.Go(func() {
			for i := next.Add(1); i <= int64(*starts) && !t.Failed(); i = next.Add(1) {
				n, took := startOnce(t, bin, dir)
				refused.Add(n)
				mu.Lock()
				slowest = max(slowest, took)
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	t.Logf("%d starts; connecting failed %d times before; the slowest took %v to the answer", *starts, refused.Load(), slowest)
}

// startOnce starts a daemon, connects to it as soon as that is possible, talks and ends it. It
// returns how often it could not connect, and the time until the answer.
func startOnce(t *testing.T, bin, dir string) (refused int64, took time.Duration) {
	sock := filepath.Join(dir, "s")
	cmd := exec.Command(bin, "--chardev", "socket,id=m,server=on,wait=off,path="+sock, "--monitor", "m",
		"--blockdev", "null-co,node-name=n")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		t.Error(err)
		return
	}
	kill := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer kill.Stop()
	c, err := net.Dial("unix", sock)
	for ; err != nil && time.Since(begin) < 15*time.Second; c, err = net.Dial("unix", sock) {
		refused++
		time.Sleep(50 * time.Microsecond)
	}
	if err != nil {
		t.Errorf("no connection: %v", err)
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = io.WriteString(c, `{"execute":"qmp_capabilities"}{"execute":"query-named-block-nodes","arguments":{"flat":true}}`)
	r := bufio.NewReader(c)
	for i, want := range []string{`{"QMP": `, `{"return": {}}`, `{"return": [{`} {
		line, err := r.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, want) {
			t.Errorf("line %d is %q: %v", i, line, err)
		}
	}
	took = time.Since(begin)
	_, _ = io.WriteString(c, `{"execute":"quit"}`)
	if _, err := io.ReadAll(r); err != nil {
		t.Errorf("at the end: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v\n%s", err, stderr.String())
	}
	return refused, took
}
