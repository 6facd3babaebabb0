package trace

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

func TestEnable(t *testing.T) {
	var buf bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewJSONHandler(&buf, nil)))
	defer slog.SetDefault(old)
	defer Enable("-*")

	NodeOpen.Log(slog.String("node", "a"))
	if buf.Len() > 0 {
		t.Fatalf("a disabled point wrote %s", buf.String())
	}
	if n := Enable("bdrv_*"); n != 2 {
		t.Errorf("bdrv_* matched %d points", n)
	}
	NodeOpen.Log(slog.String("node", "a"))
	if !strings.Contains(buf.String(), `"msg":"bdrv_open_common","node":"a"`) {
		t.Errorf("record: %s", buf.String())
	}
	if n := Enable("-bdrv_open*"); n != 1 || NodeOpen.On() || !NodeClose.On() {
		t.Errorf("disabling: %d %v %v", n, NodeOpen.On(), NodeClose.On())
	}
	if n := Enable("nosuch"); n != 0 {
		t.Errorf("nosuch matched %d", n)
	}
}
