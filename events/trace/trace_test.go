package trace

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestEnable(t *testing.T) {
	var buf bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewJSONHandler(&buf, nil)))
	defer slog.SetDefault(old)
	defer Enable("-*")

	NodeOpen.Log(slog.String("node", "a"))
	Flush(time.Minute)
	if buf.Len() > 0 {
		t.Fatalf("a disabled point wrote %s", buf.String())
	}
	if n := Enable("bdrv_*"); n != 2 {
		t.Errorf("bdrv_* matched %d points", n)
	}
	NodeOpen.Log(slog.String("node", "a"))
	Flush(time.Minute)
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

// slow is a log that waits until it is let go.
type slow struct {
	slog.Handler
	gate chan struct{}
}

func (s slow) Handle(ctx context.Context, r slog.Record) error {
	<-s.gate
	return s.Handler.Handle(ctx, r)
}

// TestSlowLog: a log that is not taken holds nobody up, and what is dropped is counted.
func TestSlowLog(t *testing.T) {
	var buf bytes.Buffer
	s := slow{slog.NewJSONHandler(&buf, nil), make(chan struct{})}
	old := slog.Default()
	slog.SetDefault(slog.New(s))
	defer slog.SetDefault(old)
	defer Enable("-*")
	Enable("block_export_delete")
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for range keep {
				ExportDelete.Log()
			}
		})
	}
	all.Wait()
	close(s.gate)
	Flush(time.Minute)
	ExportDelete.Log()
	Flush(time.Minute)
	if n := bytes.Count(buf.Bytes(), []byte("\n")); n < keep || n > 2*keep+1 {
		t.Errorf("%d records were written", n)
	}
	if !strings.Contains(buf.String(), `"lost-before":`) {
		t.Error("the lost records are not mentioned")
	}
}
