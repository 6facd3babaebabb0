package conv

import (
	"bufio"
	"bytes"
	"os"
	"slices"
	"strings"
	"testing"

	"qblockd/schema"
	"qblockd/schema/types"
)

// expectation is a line of expected.txt.
type expectation struct {
	differs bool     // the answers differ on purpose; else it waits for needs
	reason  string   // of the difference
	needs   []string // what the conversation is about and the daemon has not yet
}

// missing are the needs that are still not there.
func (e *expectation) missing(t *testing.T) (out []string) {
	for _, n := range e.needs {
		if !available(t, n) {
			out = append(out, n)
		}
	}
	return out
}

// available tells whether the schema has what a need names.
func available(t *testing.T, need string) bool {
	kind, name, _ := strings.Cut(need, ":")
	switch kind {
	case "command":
		return slices.Contains(schema.Commands(), name)
	case "driver":
		return slices.Contains(types.BlockdevDriverValues, types.BlockdevDriver(name))
	case "object":
		return slices.Contains(types.ObjectTypeValues, types.ObjectType(name))
	case "export":
		return slices.Contains(types.BlockExportTypeValues, types.BlockExportType(name))
	case "arg":
		command, member, ok := strings.Cut(name, ":")
		text := schema.JSONSchema(command)
		if !ok || text == nil {
			t.Fatalf("expected.txt: %s names no command", need)
		}
		return bytes.Contains(text, []byte(`"`+member+`": `))
	}
	t.Fatalf("expected.txt: what kind of need is %s?", need)
	return false
}

// readExpected reads expected.txt; its head explains the lines.
func readExpected(t *testing.T) map[string]*expectation {
	t.Helper()
	f, err := os.Open("expected.txt")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]*expectation{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		words := strings.Fields(sc.Text())
		if len(words) == 0 || words[0][0] == '#' {
			continue
		}
		if len(words) < 3 {
			t.Fatalf("expected.txt: %q gives no reason", sc.Text())
		}
		name, e := words[0], &expectation{}
		switch words[1] {
		case "needs":
			e.needs = words[2:]
			for _, n := range e.needs {
				available(t, n) // stops at needs of unknown kinds
			}
		case "differs":
			e.differs, e.reason = true, strings.Join(words[2:], " ")
		default:
			t.Fatalf("expected.txt: %q neither needs something nor differs", sc.Text())
		}
		if _, err := os.Stat("corpus/" + name + ".qmp"); err != nil || out[name] != nil {
			t.Fatalf("expected.txt: %s is listed twice or not a conversation", name)
		}
		out[name] = e
	}
	return out
}
