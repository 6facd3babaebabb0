package chardev

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"testing"
)

func TestMux(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	tab := newTestTable(t)
	add := func(id, b string) error {
		_, err := tab.Add(context.Background(), id, backend(t, "%s", b))
		return err
	}
	if err := add("s", fmt.Sprintf(`{"type":"socket","data":{"addr":{"type":"unix","data":{"path":%q}}}}`, path)); err != nil {
		t.Fatal(err)
	}
	if err := add("m", `{"type":"mux","data":{"chardev":"s"}}`); err != nil {
		t.Fatal(err)
	}
	if err := add("m2", `{"type":"mux","data":{"chardev":"s"}}`); err == nil || err.Error() != "Failed to add chardev 'm2': Device 's' is in use" {
		t.Error(err)
	}
	if err := tab.Remove("m"); err == nil || err.Error() != "Chardev 'm' is busy" {
		t.Error(err)
	}
	user := func(name string) Handler {
		return func(c io.ReadWriteCloser) {
			r := bufio.NewReader(c)
			for {
				line, err := r.ReadString('\n')
				if err != nil {
					return
				}
				if _, err := io.WriteString(c, name+" "+line); err != nil {
					return
				}
			}
		}
	}
	for i := range muxUsers {
		if err := tab.Attach("m", user(fmt.Sprint("user", i))); err != nil {
			t.Fatal(err)
		}
	}
	if err := tab.Attach("m", echo); err == nil || err.Error() != "Device 'm' is in use" {
		t.Error(err)
	}
	c := dial(t, "unix", path)
	r := bufio.NewReader(c)
	for i := range muxUsers + 1 {
		if _, err := io.WriteString(c, "a\x01\x01b\n"); err != nil {
			t.Fatal(err)
		}
		want := fmt.Sprintf("user%d a\x01b\n", i%muxUsers)
		if got, err := r.ReadString('\n'); err != nil || got != want {
			t.Fatalf("%q, %v, want %q", got, err, want)
		}
		if _, err := io.WriteString(c, "\x01c"); err != nil {
			t.Fatal(err)
		}
	}
}
