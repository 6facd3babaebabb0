package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"qblockd/schema"
	"qblockd/schema/model"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// decoders registers all commands without handlers: a call that panics on the nil
// handler has decoded its arguments.
type decoders map[string]types.HandlerFunc

func (d decoders) Handle(command string, f types.HandlerFunc) { d[command] = f }

func newDecoders() decoders {
	d := decoders{}
	types.RegisterBlockCore(d, nil)
	types.RegisterBlockJob(d, nil)
	types.RegisterBlockCreate(d, nil)
	types.RegisterJob(d, nil)
	types.RegisterBlockExport(d, nil)
	types.RegisterChar(d, nil)
	types.RegisterControl(d, nil)
	types.RegisterIntrospect(d, nil)
	types.RegisterQom(d, nil)
	types.RegisterTransaction(d, nil)
	return d
}

func (d decoders) decode(command string, args *value.Dict) (err error) {
	defer func() {
		if p := recover(); p != nil {
			if !strings.Contains(fmt.Sprint(p), "nil pointer") {
				panic(p)
			}
			err = nil
		}
	}()
	_, err = d[command](context.Background(), args, nil)
	return err
}

// compare reports arguments that only one of decoder and JSON Schema accepts, unless
// the difference is one of those listed in the package comment.
func compare(t *testing.T, d decoders, command string, args *value.Dict) {
	t.Helper()
	decoded, checked := d.decode(command, args), Validate(command, args)
	if (decoded == nil) == (checked == nil) {
		return
	}
	if checked == nil && contains(args, isWholeFloat) || decoded == nil && contains(args, isNegative) {
		return
	}
	t.Errorf("%s %s\n decoder: %v\n JSON Schema: %v", command, value.Append(nil, args), decoded, checked)
}

func contains(v value.Value, f func(value.Value) bool) bool {
	switch v := v.(type) {
	case value.List:
		for _, e := range v {
			if contains(e, f) {
				return true
			}
		}
	case *value.Dict:
		for _, e := range v.Members() {
			if contains(e.Value, f) {
				return true
			}
		}
	}
	return f(v)
}

func isWholeFloat(v value.Value) bool {
	f, ok := v.(float64)
	return ok && f == float64(int64(f))
}

func isNegative(v value.Value) bool {
	n, ok := v.(int64)
	return ok && n < 0
}

func loadModel(t *testing.T) *model.Schema {
	t.Helper()
	s, err := model.Build("qapi-schema.json", func(file string) ([]model.Expr, error) {
		text, err := fs.ReadFile(schema.QAPI(), file)
		if err != nil {
			return nil, err
		}
		return model.Scan(file, string(text))
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// maker makes arguments by the schema, with mistakes.
type maker struct {
	*rand.Rand
	faults float64 // probability of a mistake at each value
}

func (m *maker) value(t *model.Type, depth int) value.Value {
	if m.Float64() < m.faults {
		wrong := []value.Value{
			value.Null{}, true, int64(7), int64(-7), uint64(1 << 63), 1.5, 2.0, "x", value.List{}, &value.Dict{},
			int64(1 << 40), "on",
		}
		return wrong[m.IntN(len(wrong))]
	}
	switch t.Kind {
	case model.Enum:
		return t.Values[m.IntN(len(t.Values))].Name
	case model.Array:
		l := value.List{}
		for range m.IntN(3) {
			l = append(l, m.value(t.Elem, depth+1))
		}
		return l
	case model.Alternate:
		return m.value(t.Local[m.IntN(len(t.Local))].Type, depth+1)
	case model.Object:
		return m.object(t, depth)
	}
	switch t.JSONType() {
	case "int":
		return int64(m.IntN(200))
	case "number":
		return m.Float64()
	case "boolean":
		return m.IntN(2) == 0
	case "null":
		return value.Null{}
	}
	return "text"
}

func (m *maker) object(t *model.Type, depth int) *value.Dict {
	d := &value.Dict{}
	m.members(d, t, t.Members(), depth)
	if t.Tag != nil {
		if tag, ok := d.Get(t.Tag.Name); ok {
			if s, ok := tag.(string); ok {
				if b := t.Variant(s); b != nil {
					m.members(d, t, b.Members(), depth)
				}
			}
		}
	}
	if m.Float64() < m.faults {
		d.Set([]string{"bogus", "size", "driver"}[m.IntN(3)], int64(1))
	}
	return d
}

func (m *maker) members(d *value.Dict, _ *model.Type, ms []*model.Member, depth int) {
	for _, e := range ms {
		if e.Optional && (m.IntN(2) == 0 || depth > 6) || m.Float64() < m.faults/2 {
			continue
		}
		if depth > 8 && e.Type.Kind == model.Alternate {
			d.Set(e.Name, "node")
			continue
		}
		d.Set(e.Name, m.value(e.Type, depth+1))
	}
}

// TestAgreement pits the decoders against the JSON Schemas, on arguments made from the
// schema with few, some and many mistakes.
func TestAgreement(t *testing.T) {
	s, d := loadModel(t), newDecoders()
	for _, faults := range []float64{0, 0.03, 0.2} {
		m := &maker{rand.New(rand.NewPCG(1, 2)), faults}
		accepted, n := 0, 0
		for range 60 {
			for _, c := range s.Commands {
				args := &value.Dict{}
				if c.Arg != nil {
					args = m.object(c.Arg, 0)
				}
				compare(t, d, c.Name, args)
				n++
				if d.decode(c.Name, args) == nil {
					accepted++
				}
			}
		}
		if faults == 0 && accepted != n || faults > 0 && (accepted == 0 || accepted == n) {
			t.Errorf("with mistakes in %v of the values %d of %d were accepted", faults, accepted, n)
		}
	}
}

func FuzzAgreement(f *testing.F) {
	for _, seed := range [][2]string{
		{"blockdev-add", `{"driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "f"}, "backing": null}`},
		{"blockdev-add", `{"driver": "qcow2", "node-name": "a", "file": "f", "overlap-check": {"template": "all"}}`},
		{"blockdev-create", `{"job-id": "j", "options": {"driver": "qcow2", "file": "f", "size": 1}}`},
		{"nbd-server-start", `{"addr": {"type": "unix", "data": {"path": "p"}}, "max-connections": 4294967295}`},
		{"qmp_capabilities", `{"enable": ["oob"]}`},
		{"qom-set", `{"path": "/", "property": "x", "value": [1, {}]}`},
		{"query-block", `{}`},
	} {
		f.Add(seed[0], seed[1])
	}
	d := newDecoders()
	f.Fuzz(func(t *testing.T, command, text string) {
		v, err := value.Parse(text)
		args, ok := v.(*value.Dict)
		if err != nil || !ok || d[command] == nil {
			return
		}
		compare(t, d, command, args)
	})
}

func TestUnknownCommand(t *testing.T) {
	if err := Validate("quux", nil); !errors.Is(err, ErrUnknownCommand) {
		t.Errorf("got %v", err)
	}
}

// TestParallel compiles one schema from several goroutines, for the race detector.
func TestParallel(t *testing.T) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			args := &value.Dict{}
			args.Set("device", "d")
			if err := Validate("block-stream", args); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
