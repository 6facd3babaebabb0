package main

import (
	"bytes"
	"encoding/json"
	"testing"
)

func TestSchema(t *testing.T) {
	var b bytes.Buffer
	if err := runSchema(nil, &b); err != nil {
		t.Fatal(err)
	}
	var all map[string]struct{ Title string }
	if err := json.Unmarshal(b.Bytes(), &all); err != nil {
		t.Fatal(err)
	}
	if all["blockdev-add"].Title != "blockdev-add" || len(all) < 40 {
		t.Errorf("%d schemas, that of blockdev-add is called %q", len(all), all["blockdev-add"].Title)
	}
	b.Reset()
	if err := runSchema([]string{"quit"}, &b); err != nil || !json.Valid(b.Bytes()) {
		t.Errorf("quit: %v, %s", err, b.String())
	}
	if err := runSchema([]string{"quux"}, &b); err == nil {
		t.Error("no error for a command that does not exist")
	}
}
