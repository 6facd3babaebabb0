package types

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"qblockd/schema/value"
)

// recorder is a Registrar whose handlers stop right before they would be called.
type recorder map[string]HandlerFunc

func (r recorder) Handle(command string, f HandlerFunc) {
	if r[command] != nil {
		panic("a second handler for " + command)
	}
	r[command] = f
}

// decode decodes the arguments of a command; nil if they are accepted.
func (r recorder) decode(command string, args *value.Dict) (err error) {
	defer func() {
		if p := recover(); p != nil {
			// The handler interface is nil: decoding came to its end.
			if !strings.Contains(fmt.Sprint(p), "nil pointer") {
				panic(p)
			}
			err = nil
		}
	}()
	_, err = r[command](context.Background(), args, nil)
	return err
}

func newRecorder() recorder {
	r := recorder{}
	RegisterBlockCore(r, nil)
	RegisterBlockJob(r, nil)
	RegisterBlockCreate(r, nil)
	RegisterJob(r, nil)
	RegisterBlockExport(r, nil)
	RegisterChar(r, nil)
	RegisterControl(r, nil)
	RegisterIntrospect(r, nil)
	RegisterQom(r, nil)
	RegisterTransaction(r, nil)
	return r
}

// TestArgumentErrors compares with what QEMU answered to bad arguments.
// testdata/argument-errors.tsv: command, arguments, error text, recorded from 7.2.
func TestArgumentErrors(t *testing.T) {
	text, err := os.ReadFile("testdata/argument-errors.tsv")
	if err != nil {
		t.Fatal(err)
	}
	r := newRecorder()
	for line := range strings.Lines(string(text)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		v, err := value.Parse(f[1])
		if err != nil {
			t.Fatalf("%s: %v", f[1], err)
		}
		got := "(accepted)"
		if err := r.decode(f[0], v.(*value.Dict)); err != nil {
			got = err.Error()
		}
		if got != f[2] {
			t.Errorf("%s %s\n got  %s\n want %s", f[0], f[1], got, f[2])
		}
	}
}
