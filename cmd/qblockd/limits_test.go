package main

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

func TestSetLimits(t *testing.T) {
	l := defaultLimits()
	err := l.setLimits("qmp-message=1M,qmp-tokens=1000,qmp-nesting=9,qmp-clients=2,qmp-hold=1,qmp-unsent=64k,qmp-unsent-all=2M,qmp-unfinished-all=3M," +
		"nbd-connections=3,nbd-handshake=4,nbd-inflight=5,nbd-inflight-bytes=0.5M")
	if err != nil {
		t.Fatal(err)
	}
	var want limits
	want.qmp.Input.TokenBytes, want.qmp.Input.Tokens, want.qmp.Input.Depth = 1<<20, 1000, 9
	want.qmp.HoldInput, want.qmp.Unsent, want.clients = 1, 64<<10, 2
	want.allUnsent, want.allUnfinished = 2<<20, 3<<20
	want.connections, want.handshake, want.inflight, want.bytes = 3, 4*time.Second, 5, 1<<19
	if l != want {
		t.Errorf("got  %+v\nwant %+v", l, want)
	}
	if err := l.setLimits("nbd-handshake=0"); err != nil || l.nbdServer().Handshake >= 0 {
		t.Errorf("no limit: %v %v", err, l.handshake)
	}
	for arg, want := range map[string]string{
		"qmp-unsent=1":                      "Parameter 'qmp-unsent' expects a value from 64K to 1T",
		"nbd-connections=0":                 "Parameter 'nbd-connections' expects a value from 1 to 1073741824",
		"nbd-inflight=18446744073709551615": "Parameter 'nbd-inflight' expects a value from 1 to 1073741824",
		"nbd-handshake=-1":                  "Parameter 'nbd-handshake' expects a number",
		"memory=1":                          "Invalid parameter 'memory'",
		"id=a,qmp-nesting=10":               "Invalid parameter 'id'",
	} {
		before := l
		if err := l.setLimits(arg); err == nil || err.Error() != want || l != before {
			t.Errorf("%s: %v", arg, err)
		}
	}
}

// TestLimitsAreDocumented: the table of docs/limits.md is what --limit help says.
func TestLimitsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	l := defaultLimits()
	rows := 0
	for _, d := range allLimits {
		row := fmt.Sprintf("| `%s` | %s | %s |\n", d.name, d.show(d.get(&l)), d.text)
		if !strings.Contains(string(doc), row) {
			t.Errorf("docs/limits.md lacks\n%s", row)
		}
		if !strings.Contains(limitsText(), "  "+d.name+"="+d.show(d.get(&l))+" ") {
			t.Errorf("--limit help lacks %s", d.name)
		}
		d.set(&l, d.get(&l))
		rows++
	}
	if l != defaultLimits() {
		t.Errorf("setting what holds changes it: %+v", l)
	}
	if n := strings.Count(string(doc), "\n| `"); n != rows {
		t.Errorf("docs/limits.md has %d limits of %d", n, rows)
	}
}
