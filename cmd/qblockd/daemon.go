package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"qblockd/blockdev"
	"qblockd/blockdev/drivers"
	"qblockd/blockdev/export"
	"qblockd/blockdev/export/fuse"
	"qblockd/blockdev/export/nbd"
	"qblockd/blockdev/export/vhostuser"
	"qblockd/blockdev/object"
	"qblockd/cmd/version"
	"qblockd/events"
	"qblockd/events/panics"
	"qblockd/events/trace"
	"qblockd/graph"
	"qblockd/jobs"
	"qblockd/jobs/visible"
	"qblockd/qmp"
	"qblockd/qmp/chardev"
	"qblockd/qmp/handlers"
	"qblockd/schema/types"
)

// The version of QEMU whose interface we offer.
const (
	qemuMajor = 8
	qemuMinor = 2
	qemuMicro = 7
)

const (
	// endPatience is how long nothing may move during the orderly end, in all; storage that does
	// not answer is given up then.
	endPatience = 1500 * time.Millisecond
	// lastReply is how long clients have to take what is still queued for them.
	lastReply = 300 * time.Millisecond
)

// daemon is all parts of the program.
type daemon struct {
	bus      *events.Bus
	graph    *graph.Graph
	nodes    *blockdev.Manager
	jobs     *jobs.Manager
	exports  *export.Table
	nbd      *nbd.Type
	objects  *object.Registry
	chardevs *chardev.Table
	dispatch *qmp.Dispatcher
	limits   limits
	memory   returner
	pidfile  *pidFile

	up       chan struct{} // closed when the options have taken effect: from now on clients are served
	end      chan struct{} // closed when the daemon is to exit
	endOnce  sync.Once
	downOnce sync.Once
	down     chan struct{} // closed when everything but the monitors is shut down

	mu       sync.Mutex
	monitors []*qmp.Monitor
}

// newDaemon makes the parts.
func newDaemon(p processWide) *daemon {
	d := &daemon{
		bus:    events.NewBus(events.Options{}),
		limits: p.limits,
		up:     make(chan struct{}),
		end:    make(chan struct{}),
		down:   make(chan struct{}),
	}
	d.graph = graph.New(d.bus)
	d.objects = object.NewRegistry(d.chardevObjects)
	d.jobs = jobs.NewManager(d.bus, nil)
	d.nodes = blockdev.New(d.graph, blockdev.Config{
		Drivers: drivers.All, Objects: d.objects, Policy: p.policy,
		Probed: func(n *graph.Node) { d.jobs.Show(visible.NodeProbed, n) },
	})
	d.exports = export.New(d.graph, export.Options{
		Iothread: d.iothread, Leaving: func(n *graph.Node) { d.jobs.Show(visible.ExportLeft, n) }, Log: slog.Default(),
	})
	o := p.limits.nbdServer()
	o.SocketMode, o.Idle, o.Log, o.Objects = p.socketMode, d.memory.giveBack, slog.Default(), d.objects
	d.nbd = nbd.NewType(d.exports, o)
	fuse.NewType(d.exports, slog.Default())
	vhostuser.NewType(d.exports, vhostuser.Options{SocketMode: p.socketMode, Log: slog.Default()})
	d.chardevs = chardev.NewTable(chardev.Options{
		SocketMode: p.socketMode, MaxClients: p.limits.clients, Detached: p.daemonize, Objects: d.objects,
	})
	d.dispatch = qmp.NewDispatcher(qmp.Version{
		Major: qemuMajor, Minor: qemuMinor, Micro: qemuMicro, Package: "qblockd " + version.Version,
	})
	d.dispatch.LimitUnsent(p.limits.allUnsent)
	d.dispatch.LimitUnfinished(p.limits.allUnfinished)
	d.register()
	d.bugs()
	return d
}

// register connects the commands to the parts that execute them.
func (d *daemon) register() {
	types.RegisterControl(d.dispatch, handlers.Control{
		Version: d.dispatch.Version(), Shutdown: func(context.Context) { d.shutdown() }, Exit: d.exit,
	})
	types.RegisterIntrospect(d.dispatch, handlers.Introspect{})
	types.RegisterChar(d.dispatch, handlers.Char{Devices: d.chardevs})
	types.RegisterQom(d.dispatch, handlers.Qom{Objects: d.objects})
	types.RegisterBlockCore(d.dispatch, handlers.BlockCore{Nodes: d.nodes, Exports: d.exports, Jobs: d.jobs})
	types.RegisterBlockCreate(d.dispatch, handlers.BlockCreate{Jobs: d.jobs, Nodes: d.nodes})
	blockJob := handlers.BlockJob{Graph: d.graph, Jobs: d.jobs, Nodes: d.nodes}
	types.RegisterBlockJob(d.dispatch, blockJob)
	types.RegisterJob(d.dispatch, handlers.Job{Jobs: d.jobs})
	types.RegisterTransaction(d.dispatch, handlers.Transaction{Nodes: d.nodes, Jobs: blockJob})
	types.RegisterBlockExport(d.dispatch, handlers.BlockExport{Graph: d.graph, Exports: d.exports, NBD: d.nbd})
}

// addMonitor makes QMP available on a character device. Its clients are served once the daemon is
// up.
func (d *daemon) addMonitor(_ context.Context, o *types.MonitorOptions) error {
	if types.Or(o.Mode, types.MonitorModeControl) != types.MonitorModeControl {
		return errors.New("Only QMP is supported")
	}
	m := qmp.NewMonitor(d.dispatch, d.bus, qmp.Options{
		Pretty: types.Or(o.Pretty, false), ReadOnly: types.Or(o.ReadOnly, false),
		Limits: d.limits.qmp, Idle: d.memory.giveBack,
	})
	attach := d.chardevs.Attach
	if o.AllowUid != nil {
		attach = func(id string, h chardev.Handler) error { return d.chardevs.AttachFor(id, o.AllowUid, h) }
	}
	err := attach(o.Chardev, func(c io.ReadWriteCloser) {
		select {
		case <-d.up:
			m.Serve(c)
		case <-d.end:
			c.Close()
		}
	})
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.monitors = append(d.monitors, m)
	return nil
}

// catchSignals makes the ending signals known. The context ends with the first, for what may take
// long before anybody waits for them. SIGPIPE becomes an error of the write that met it.
func (d *daemon) catchSignals() (context.Context, <-chan os.Signal) {
	signal.Ignore(syscall.SIGPIPE)
	c := make(chan os.Signal, 2)
	ending := []os.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP}
	signal.Notify(c, ending...)
	ctx, _ := signal.NotifyContext(context.Background(), ending...) // for the life of the process
	return ctx, c
}

// exit makes waitForEnd go on.
func (d *daemon) exit() { d.endOnce.Do(func() { close(d.end) }) }

// waitForEnd blocks until quit was answered or a signal came, and ends the program.
func (d *daemon) waitForEnd(signals <-chan os.Signal) {
	select {
	case s := <-signals:
		slog.Info("ending", "signal", s.String())
		d.shutdown()
		d.exit()
	case <-d.end:
	}
	d.endMonitors()
	d.pidfile.remove()
	trace.Flush(lastReply)
	os.Exit(0)
}

// shutdown ends everything but the monitors, in order: no further commands, no clients of exports,
// no jobs, all data flushed and all nodes closed. What storage that does not answer holds up is
// left behind after endPatience. It is done once; others wait for it.
func (d *daemon) shutdown() {
	d.downOnce.Do(func() {
		defer close(d.down)
		d.dispatch.Stop()
		ctx, cancel := d.graph.Patient(context.Background(), endPatience)
		defer cancel()
		d.exports.Close(ctx)
		jobsCtx, cancelJobs := graph.Share(ctx, 1, 4) // what comes after the jobs needs time too
		defer cancelJobs()
		if err := d.jobs.Shutdown(jobsCtx); err != nil {
			slog.Warn("jobs are left behind", "err", err)
		}
		if err := d.graph.Close(ctx); err != nil {
			slog.Warn("nodes are left behind", "err", err)
		}
	})
	<-d.down
}

// endMonitors lets clients take what is queued for them and removes sockets.
func (d *daemon) endMonitors() {
	done := make(chan struct{})
	panics.Go("the end of the monitors", func() {
		defer close(done)
		var all panics.Group
		d.mu.Lock()
		for _, m := range d.monitors {
			all.Go("the end of a monitor", func() { m.Close(lastReply) })
		}
		d.mu.Unlock()
		all.Wait()
		d.chardevs.Close()
	}, nil)
	select {
	case <-done:
	case <-time.After(lastReply + 200*time.Millisecond):
		// A command is stuck on its storage; the sockets have gone all the same.
	}
}

// abandon undoes what options have made before one failed.
func (d *daemon) abandon() {
	d.shutdown()
	d.exit()
	d.endMonitors()
}

// iothread finds an iothread object for exports.
func (d *daemon) iothread(id string) export.Workers {
	if g := d.objects.Iothread(id); g != nil {
		return g
	}
	return nil
}

// chardevObjects lists the character devices for the object tree.
func (d *daemon) chardevObjects() (out []object.Chardev) {
	for _, c := range d.chardevs.Query() {
		kind, _, _ := strings.Cut(strings.TrimPrefix(c.Filename, "disconnected:"), ":")
		switch kind {
		case "unix", "tcp", "telnet", "fd":
			kind = "socket"
		}
		out = append(out, object.Chardev{Label: c.Label, Kind: kind})
	}
	return out
}
