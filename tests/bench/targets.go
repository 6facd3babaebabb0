package main

import (
	"math"
	"regexp"
)

// target: figures that match are to be least times better than the peer, as the median of the
// pairs' ratios.
type target struct {
	figure string // regular expression for all of group/metric
	peer   string
	least  float64
}

// targets: the first that matches a figure and a peer counts.
var targets = []target{
	{"qmp/query-version round trip p50", qsd, 5},
	{"qmp/query-version round trip p99", qsd, 5},
	{"qmp/10k pipelined", qsd, 20},
	{"qmp/8 monitors", qsd, 5},
	{"graph/blockdev-add .*", qsd, 5},
	{"graph/flat query of 10,000 nodes", qsd, 3},
	{"graph/RSS a node", qsd, 5},
	{"chain( override)?/full query", qsd, 50},
	{"chain( override)?/RSS a layer", qsd, 3},

	{"vhost-user-blk .*/.*, CPU a request", qsd, 1},
	{"vhost-user-blk .*/rand.*", qsd, 1.5},
	{"vhost-user-blk .*/.* 1 MiB .*", qsd, 1.2},

	{"nbd luks/.*", qsd, 1},
	{"nbd encrypted qcow2/.*", qsd, 1},
	{"nbd client of .*/rand.* qd1", qsd, 1},
	{"nbd client of .*/.*", qsd, 2},
	{"nbd tls .*", qsd, 1},
	{"nbd tls .*", qsd10, 1},
	{"nbd .*/read 1 MiB qd8", qsd, 2.5},
	{"nbd .*/read 1 MiB qd8 x4", qsd, 4},
	{"nbd .*/write 1 MiB qd8", qsd, 1.5},
	{"nbd .*/randread 4 KiB qd1", qsd, 1.2},
	{"nbd .*/randread 4 KiB qd16", qsd, 3},
	{"nbd .*/randread 4 KiB qd64 x4", qsd, 4},
	{"nbd .*/randwrite 4 KiB qd16", qsd, 2},
	{"nbd raw .*/(write 1 MiB qd8|rand.* qd1)", nbdkit, 0.95},
	{"nbd raw .*/.*", nbdkit, 1},
	{"nbd raw .*/.*", qemuNBD, 1},

	{"fuse .*/read 1 MiB.*", qsd, 1.5},
	{"fuse .*/randread 4 KiB.*", qsd, 1.5},
	{"fuse .*", qsd, 1},

	{"stream .*/block-stream", qsd, 1.3},
	{"mirror to NBD/.*", qsd, 1.5},
	{"64 TiB .*/bitmap backup .*", qsd, 1},
	{"64 TiB in clusters of 64 KiB/RSS at its end", qsd, 1},
	{"bitmap .*/merge again", qsd, 0.8},
	{"start/start to greeting", qsd, 0.4},
	{"start/RSS idle", qsd, 0.5},
}

// limits are what our own median of a figure may be at most, in its unit.
var limits = []target{
	// The same cost with 10,000 nodes as with 10, but for caches of the processor.
	{"graph/10,000 nodes against 10", us, 1.5},
}

func targetOf(figure, peer string) float64 { return find(targets, figure, peer) }
func limitOf(figure string) float64        { return find(limits, figure, us) }

func find(ts []target, figure, peer string) float64 {
	for _, t := range ts {
		if t.peer == peer && regexp.MustCompile("^(?:"+t.figure+")$").MatchString(figure) {
			return t.least
		}
	}
	return 0
}

var nan = math.NaN()
