package blockdev

import "testing"

func TestPaths(t *testing.T) {
	for name, want := range map[string]bool{"a:b": true, "a/b:c": false, "/a:b": false, "": false, "a": false, ":": true, "nbd://h:1/x": true} {
		if hasProtocol(name) != want {
			t.Errorf("hasProtocol(%q) = %v", name, !want)
		}
	}
	for _, c := range [][3]string{
		{"/d/top", "base", "/d/base"},
		{"top", "base", "base"},
		{"d/top", "../base", "d/../base"},
		{"/d/top", "/base", "/base"},
		{"nbd:top", "base", "nbd:base"},
		{"nbd://host/top", "base", "nbd://host/base"},
		{"/d/top", "", "/d/"},
		{"a/b:c", "x", "a/x"},
	} {
		if got := combine(c[0], c[1]); got != c[2] {
			t.Errorf("combine(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
	for _, c := range [][3]string{
		{"file:x", "file:", "x"},
		{"file:a:b", "file:", "./a:b"},
		{"a:b", "file:", "a:b"},
		{"x", "file:", "x"},
	} {
		if got := stripPrefix(c[0], c[1]); got != c[2] {
			t.Errorf("stripPrefix(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
}
