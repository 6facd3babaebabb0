package driver

import "testing"

func TestPaths(t *testing.T) {
	for name, want := range map[string]bool{"a:b": true, "a/b:c": false, "/a:b": false, "": false, "a": false, ":": true, "nbd://h:1/x": true} {
		if HasProtocol(name) != want {
			t.Errorf("HasProtocol(%q) = %v", name, !want)
		}
	}
	for _, c := range [][3]string{
		{"file:x", "file:", "x"},
		{"file:a:b", "file:", "./a:b"},
		{"a:b", "file:", "a:b"},
		{"x", "file:", "x"},
	} {
		if got := StripPrefix(c[0], c[1]); got != c[2] {
			t.Errorf("StripPrefix(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
}
