// Package trace holds the daemon's trace points: named places that, once enabled by a pattern,
// write a structured log record each time they are passed. A disabled point costs one atomic load.
// An enabled one never waits: records go through a bounded queue, and how many were dropped is
// logged when there is room again.
//
// Its lock is a leaf: points are passed under any lock.
package trace

import (
	"log/slog"
	"path"
	"strings"
	"sync/atomic"
	"time"
)

// Point is one trace point.
type Point struct {
	name string
	on   atomic.Bool
}

// The trace points; names are QEMU's where it has the same.
var (
	CommandInBand    = Point{name: "monitor_qmp_cmd_in_band"}
	CommandOutOfBand = Point{name: "monitor_qmp_cmd_out_of_band"}
	Reply            = Point{name: "monitor_qmp_respond"}
	EventEmit        = Point{name: "monitor_protocol_event_emit"}
	NodeOpen         = Point{name: "bdrv_open_common"}
	NodeClose        = Point{name: "bdrv_close"}
	JobTransition    = Point{name: "job_state_transition"}
	NBDNegotiate     = Point{name: "nbd_negotiate_success"}
	NBDRequest       = Point{name: "nbd_receive_request"}
	ExportDelete     = Point{name: "block_export_delete"}
)

// Points lists every trace point.
func Points() []*Point {
	return []*Point{&CommandInBand, &CommandOutOfBand, &Reply, &EventEmit, &NodeOpen, &NodeClose,
		&JobTransition, &NBDNegotiate, &NBDRequest, &ExportDelete}
}

// Name is the point's name.
func (p *Point) Name() string { return p.name }

// On tells whether the point is enabled. Callers check it before they gather attributes.
func (p *Point) On() bool { return p.on.Load() }

// Log queues a record with the given attributes if the point is enabled.
func (p *Point) Log(attrs ...slog.Attr) {
	if !p.on.Load() {
		return
	}
	r := slog.NewRecord(time.Now(), slog.LevelInfo, p.name, 0)
	r.AddAttrs(attrs...)
	queue.put(r)
}

// Enable switches on the points that match a pattern with '*' wildcards, or off with a leading '-'.
// It returns how many matched.
func Enable(pattern string) int {
	pattern, off := strings.CutPrefix(pattern, "-")
	n := 0
	for _, p := range Points() {
		if ok, err := path.Match(pattern, p.name); err == nil && ok {
			p.on.Store(!off)
			n++
		}
	}
	return n
}
