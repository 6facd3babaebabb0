package interop

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"qblockd/tests/daemon"
)

// TestMonitorsForSome has monitors for everybody, for those who only ask, and for certain users.
func TestMonitorsForSome(t *testing.T) {
	dir := t.TempDir()
	socket := func(id string) string {
		return fmt.Sprintf("socket,id=%s,server=on,wait=off,path=%s", id, filepath.Join(dir, id))
	}
	me := os.Getuid()
	d := daemon.Start(t, dir,
		"--chardev", socket("ask"), "--monitor", "ask,read-only=on",
		"--chardev", socket("mine"), "--monitor", fmt.Sprintf("mine,allow-uid.0=%d,allow-uid.1=%d", me+1, me),
		"--chardev", socket("theirs"), "--monitor", fmt.Sprintf(`{"chardev":"theirs","allow-uid":[%d],"read-only":true}`, me+1),
		"--chardev", socket("nobodys"), "--monitor", `{"chardev":"nobodys","allow-uid":[]}`)
	ask, err := daemon.DialQMP(filepath.Join(dir, "ask"), time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	defer ask.Close()
	ask.Must(t, "query-named-block-nodes", nil)
	for _, command := range []string{"quit", "object-add", "nbd-server-stop"} {
		want := "GenericError: The command " + command + " is not allowed on a read-only monitor"
		if _, err := ask.Do(command, map[string]any{}); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	mine, err := daemon.DialQMP(filepath.Join(dir, "mine"), time.Now().Add(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	mine.Must(t, "object-add", map[string]any{"qom-type": "iothread", "id": "i"})
	if out := ask.Must(t, "qom-list", map[string]any{"path": "/objects"}); !bytes.Contains(out, []byte(`"i"`)) {
		t.Errorf("who only asks sees %s", out)
	}
	for _, id := range []string{"theirs", "nobodys"} {
		if _, err := daemon.DialQMP(filepath.Join(dir, id), time.Now().Add(time.Minute)); err == nil {
			t.Errorf("the monitor %s is for me", id)
		}
	}
	d.Stop(t)
	for arg, want := range map[string]string{
		"socket,id=m,server=on,wait=off,host=127.0.0.1,port=0": "'allow-uid' needs a character device that listens on a unix socket, " +
			"which 'm' does not",
		"stdio,id=m": "'allow-uid' needs a character device that listens on a unix socket, which 'm' does not",
	} {
		out, err := exec.Command(daemon.Binary(t), "--chardev", arg, "--monitor", "m,allow-uid.0=0").CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s", arg, err, out)
		}
	}
	for arg, want := range map[string]string{
		"m,allow-uid=0":    "Invalid parameter type for 'allow-uid', expected: array",
		"m,allow-uid.0=-1": " expects uint32_t",
		"m,allow-uid.0=me": "Parameter 'allow-uid.0' expects integer",
	} {
		out, err := exec.Command(daemon.Binary(t), "--chardev", "null,id=m", "--monitor", arg).CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v, %s", arg, err, out)
		}
	}
}
