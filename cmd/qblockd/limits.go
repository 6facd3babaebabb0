package main

import (
	"fmt"
	"strings"
	"time"

	"qblockd/blockdev/export/nbd"
	"qblockd/cmd/qblockd/cmdline"
	"qblockd/qmp"
	"qblockd/qmp/chardev"
	"qblockd/schema/value"
)

// limits bound what clients can make the daemon hold. Every field has a value.
type limits struct {
	qmp           qmp.Limits
	allUnsent     int64 // of the clients of all monitors
	allUnfinished int64 // the same
	clients       int   // of one monitor socket
	connections   int   // of the NBD server, where its own option or command does not say
	handshake     time.Duration
	inflight      int
	bytes         int64
}

func defaultLimits() limits {
	return limits{
		qmp:           qmp.Limits{HoldInput: qmp.DefaultHoldInput, Unsent: qmp.DefaultUnsent, Input: value.DefaultLimits},
		allUnsent:     qmp.DefaultAllUnsent,
		allUnfinished: qmp.DefaultAllUnfinished,
		clients:       chardev.DefaultMaxClients,
		connections:   nbd.DefaultMaxConns,
		handshake:     nbd.DefaultHandshake,
		inflight:      nbd.DefaultInflight,
		bytes:         nbd.DefaultInflightBytes,
	}
}

// nbdServer are the limits as options of an NBD server.
func (l *limits) nbdServer() nbd.Options {
	return nbd.Options{
		MaxConns: uint32(l.connections), Handshake: l.handshake, Inflight: l.inflight, InflightBytes: l.bytes,
	}
}

// limit describes one of the limits: --limit, its help and docs/limits.md go by it.
type limit struct {
	name     string
	size     bool  // counted in bytes; takes a unit suffix
	min, max int64 // allowed values
	get      func(*limits) int64
	set      func(*limits, int64)
	text     string // what is limited
}

// Bounds that keep values within what the code counts with and a daemon can work with.
const (
	maxSize  = 1 << 40
	maxCount = 1 << 30
)

// number makes a limit of an integer.
func number[T int | int64](name string, size bool, least int64, field func(*limits) *T, text string) limit {
	most := int64(maxCount)
	if size {
		most = maxSize
	}
	return limit{name, size, least, most,
		func(l *limits) int64 { return int64(*field(l)) },
		func(l *limits, n int64) { *field(l) = T(n) }, text}
}

var allLimits = []limit{
	number("qmp-message", true, 4<<10, func(l *limits) *int { return &l.qmp.Input.TokenBytes },
		"bytes of one message of a monitor's client; a longer one gets an error"),
	number("qmp-tokens", false, 100, func(l *limits) *int { return &l.qmp.Input.Tokens },
		"JSON tokens of one message"),
	number("qmp-nesting", false, 8, func(l *limits) *int { return &l.qmp.Input.Depth },
		"JSON objects and arrays open at once"),
	number("qmp-clients", false, 1, func(l *limits) *int { return &l.clients },
		"clients of one character device; further ones wait in the socket's queue"),
	number("qmp-hold", true, 1, func(l *limits) *int { return &l.qmp.HoldInput },
		"bytes that a client has not read above which its commands wait"),
	number("qmp-unsent", true, 64<<10, func(l *limits) *int { return &l.qmp.Unsent },
		"bytes that a client has not read above which it is disconnected; one reply may exceed it"),
	number("qmp-unsent-all", true, 1<<20, func(l *limits) *int64 { return &l.allUnsent },
		"bytes that all clients together have not read; above it those with most are disconnected"),
	number("qmp-unfinished-all", true, 1<<20, func(l *limits) *int64 { return &l.allUnfinished },
		"bytes of messages that clients have begun and not ended, all together; above it those with most are disconnected"),
	number("nbd-connections", false, 1, func(l *limits) *int { return &l.connections },
		"connections of an NBD server that was not told max-connections"),
	{"nbd-handshake", false, 0, 86400,
		func(l *limits) int64 { return int64(max(l.handshake, 0) / time.Second) },
		func(l *limits, n int64) {
			if l.handshake = time.Duration(n) * time.Second; n == 0 {
				l.handshake = -1 // none; 0 means the default there
			}
		},
		"seconds until an NBD handshake is over or its connection closed; 0: no limit"},
	number("nbd-inflight", false, 1, func(l *limits) *int { return &l.inflight },
		"requests of one NBD connection under way; further ones are not read"),
	number("nbd-inflight-bytes", true, 64<<10, func(l *limits) *int64 { return &l.bytes },
		"bytes of their data; one request may exceed it"),
}

// setLimits does an argument of --limit.
func (l *limits) setLimits(arg string) error {
	known := map[string]cmdline.OptType{}
	for _, d := range allLimits {
		known[d.name] = cmdline.OptNumber
		if d.size {
			known[d.name] = cmdline.OptSize
		}
	}
	o, err := parseSettings(arg, known, limitsText)
	if err != nil {
		return err
	}
	for _, d := range allLimits {
		if _, given := o.Get(d.name); !given {
			continue
		}
		n := o.Number(d.name)
		if n < uint64(d.min) || n > uint64(d.max) {
			return fmt.Errorf("Parameter '%s' expects a value from %s to %s", d.name, d.show(d.min), d.show(d.max))
		}
		d.set(l, int64(n))
	}
	return nil
}

// show writes a value as it is given on the command line.
func (d *limit) show(n int64) string {
	units := "KMGT"
	unit := ""
	for d.size && n > 0 && n%1024 == 0 && units != "" {
		n /= 1024
		unit, units = units[:1], units[1:]
	}
	return fmt.Sprint(n) + unit
}

// limitsText is what --limit help shows.
func limitsText() string {
	var b strings.Builder
	l := defaultLimits()
	for _, d := range allLimits {
		fmt.Fprintf(&b, "  %-28s %s\n", d.name+"="+d.show(d.get(&l)), d.text)
	}
	return b.String()
}
