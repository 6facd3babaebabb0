package blockdev

import "testing"

func TestFolder(t *testing.T) {
	for name, want := range map[string]string{
		"/d/top": "/d/", "top": "", "d/top": "d/", "nbd:top": "nbd:", "nbd://host/top": "nbd://host/", "a/b:c": "a/",
	} {
		if got := folder(name); got != want {
			t.Errorf("folder(%q) = %q, want %q", name, got, want)
		}
	}
}
