// Bench puts the same loads on qblockd, qemu-storage-daemon, nbdkit's file plugin and qemu-nbd by
// turns, and prints for each figure the medians, the median of the pairs' ratios with minimum and
// maximum, and whether the target holds.
//
//	go run ./tests/bench [-quick] [-cases REGEX] [-pairs 9] [-secs 0.4] [-json FILE]
//
// A ratio says how many times better qblockd is, whatever the unit. A machine that does other
// things as well changes figures by factors, but the same for neighbours: hence pairs. In each
// round every server has its turn, in an order that is rotated and reversed from round to round,
// and only values of one round are divided by each other.
//
// Peers that are not installed are skipped, and named at the begin and the end. qblockd is built
// from the tree. The clients are our own (nbd.go, qmp.go): a thread a connection, raw descriptors,
// many replies a system call.
//
//	main.go     options, and who is there         bench.go    rounds, ratios, what is printed
//	targets.go  what is to be reached, as data    procs.go    starting servers
//	nbd.go      NBD load client                   qmp.go      QMP client
//	vhost*.go   vhost-user-blk load client
//	loads_*.go  the loads                         images.go   what the servers serve
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"runtime/debug"
	"syscall"
)

func main() {
	debug.SetGCPercent(400)
	runtime.GOMAXPROCS(max(runtime.NumCPU(), 4))
	// A server that went away is an error of write, not the end.
	signal.Ignore(syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	b := &bench{ctx: ctx, size: 512 << 20, budget: 16}
	var cases string
	var list bool
	flag.StringVar(&cases, "cases", "", "only the loads whose `regex` matches \"group/load\"")
	flag.IntVar(&b.pairs, "pairs", 9, "rounds of each load; long ones do fewer")
	flag.Float64Var(&b.secs, "secs", 0.4, "`seconds` of each load on each server in a round")
	flag.StringVar(&b.json, "json", "", "write the figures to `file` as well")
	flag.StringVar(&b.qblockd, "qblockd", "", "the `program` to measure instead of one built from the tree")
	flag.StringVar(&b.disk, "disk", os.TempDir(), "`folder` on a disk")
	flag.StringVar(&b.shm, "tmpfs", "/dev/shm", "`folder` in memory")
	flag.BoolVar(&b.quick, "quick", false, "3 short rounds on small images, unless told otherwise")
	flag.BoolVar(&list, "list", false, "print the loads and end")
	flag.Parse()
	if flag.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flag.Arg(0))
	}
	if b.quick {
		set := map[string]bool{}
		flag.Visit(func(f *flag.Flag) { set[f.Name] = true })
		if !set["pairs"] {
			b.pairs = 3
		}
		if !set["secs"] {
			b.secs = 0.15
		}
		b.size, b.budget = 128<<20, 4
	}
	if b.pairs < 1 || b.secs <= 0 {
		return fmt.Errorf("-pairs and -secs must be positive")
	}
	var err error
	if b.cases, err = regexp.Compile(cases); err != nil {
		return err
	}
	if list {
		for _, g := range b.groups() {
			for _, l := range g.loads {
				fmt.Println(g.name + "/" + l.name)
			}
		}
		return nil
	}
	if err := b.begin(); err != nil {
		return err
	}
	defer b.end()
	for _, g := range b.groups() {
		if err := b.group(g); err != nil {
			return err
		}
	}
	return b.summary()
}

// groups are all loads, in the order in which they run.
func (b *bench) groups() []*group {
	return []*group{
		startLoads(b), monitorLoads(b), graphLoads(b), chainLoads(b, true), chainLoads(b, false),
		rawLoads(b, "tmpfs"), rawLoads(b, "disk"), tlsLoads(b, "x509"), tlsLoads(b, "psk"),
		qcow2Loads(b), luksLoads(b, "luks"), luksLoads(b, "qcow2"),
		allocatingLoads(b), copyOnWriteLoads(b),
		vhostRawLoads(b, "tmpfs"), vhostRawLoads(b, "disk"), vhostQcow2Loads(b),
		clientLoads(b, qemuNBD), clientLoads(b, nbdkit), clientLoads(b, us),
		fuseLoads(b, "raw", "tmpfs"), fuseLoads(b, "raw", "disk"), fuseLoads(b, "qcow2", "tmpfs"),
		streamLoads(b, "tmpfs"), streamLoads(b, "disk"), mirrorLoads(b), bitmapLoads(b), hugeLoads(b, "64 KiB"), hugeLoads(b, "2 MiB"),
	}
}
