package hostile

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestBases: without damage they are sound, for the inspection and for qemu-img.
func TestBases(t *testing.T) {
	_, missing := exec.LookPath("qemu-img")
	if missing != nil {
		t.Log("SKIPPED: qemu-img is not installed and does not check the images")
	}
	for _, s := range Specs {
		dir := t.TempDir()
		name := filepath.Join(dir, imageName)
		for n, b := range map[string]*Base{
			name:                             NewBase(s),
			filepath.Join(dir, "back.qcow2"): NewBase(Spec{Version: 3, ClusterBits: 12, Order: 4, Size: 1 << 20}),
			filepath.Join(dir, "back.raw"):   NewBase(Spec{Version: 3, ClusterBits: 9, Order: 4}),
		} {
			if err := b.WriteTo(n); err != nil {
				t.Fatal(err)
			}
		}
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		i, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		if r := Inspect(f, i.Size()); !r.Parsed || len(r.Corruptions) > 0 || r.lost || len(r.disk) > 0 {
			t.Errorf("%s: %v, %v", s.Name, r.Corruptions, r.disk)
		}
		f.Close()
		if missing != nil {
			continue
		}
		out, err := exec.Command("qemu-img", "check", name).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "No errors were found") {
			t.Errorf("%s: %v\n%s", s.Name, err, out)
		}
	}
}

// TestCases: a case is the same each time, and each single damage is some case.
func TestCases(t *testing.T) {
	a, b := NewCases(1, Names(imageName)), NewCases(1, Names(imageName))
	if a.Singles() < 10_000 || a.Singles() != b.Singles() {
		t.Errorf("%d and %d cases of one damage", a.Singles(), b.Singles())
	}
	seen := map[string]bool{}
	for n := range a.Singles() + 2000 {
		x, y := a.Case(n), b.Case(n)
		if x.String() != y.String() {
			t.Fatalf("%v is %v the next time", x, y)
		}
		if n < a.Singles() {
			_, what, _ := strings.Cut(x.String(), ": ")
			if seen[what] {
				t.Errorf("%s is there twice", what)
			}
			seen[what] = true
		} else if len(x.Damages) < 2 {
			t.Errorf("%v", x)
		}
	}
}
