package drivers

import (
	"testing"

	"qblockd/graph"
	"qblockd/schema/types"
)

// Each driver of the schema has one Def, and protocols can be found by a name.
func TestAll(t *testing.T) {
	have := map[types.BlockdevDriver]bool{}
	for _, d := range All {
		if have[d.Name] {
			t.Errorf("%s is there twice", d.Name)
		}
		have[d.Name] = true
		if d.Kind == graph.Protocol && (d.Prefix == "" || d.FromName == nil || d.Filename == nil) {
			t.Errorf("%s has no file names", d.Name)
		}
		if d.Reopen == nil && len(d.Changeable)+len(d.ChangeOnly) > 0 {
			t.Errorf("%s cannot be reopened, and has options that a reopen may change", d.Name)
		}
	}
	for _, name := range types.BlockdevDriverValues {
		if !have[name] {
			t.Errorf("%s is in the schema and not here", name)
		}
	}
	if len(have) != len(types.BlockdevDriverValues) {
		t.Errorf("%d drivers, %d in the schema", len(have), len(types.BlockdevDriverValues))
	}
}
