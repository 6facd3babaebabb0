package export

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"

	"qblockd/blockdev/export/nbd"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/qmp/chardev/sockets"
	"qblockd/schema/types"
)

// device shows a root to the NBD server.
type device struct {
	*graph.Root
	writable bool // the root claims to write
}

// Prefetch implements nbd.Device. Without a claim to write nothing can be copied into the top
// layer; the data are read, which brings them into the host's cache.
func (d device) Prefetch(r *blk.Req, off, n int64) error {
	if d.writable {
		return d.Root.Prefetch(r, off, n)
	}
	const piece = 1 << 20
	buf := blk.GetBuf(int(min(n, piece)), 0)
	defer blk.PutBuf(buf)
	for end := off + n; off < end; {
		k := min(end-off, piece)
		if err := d.ReadAt(r, blk.Buf(buf.B[:k]), off, 0); err != nil {
			return err
		}
		off += k
	}
	return nil
}

// Status implements nbd.Device: what the whole chain holds.
func (d device) Status(r *blk.Req, off, n int64) (blk.Extent, error) {
	return d.Root.StatusAbove(r, nil, false, off, n)
}

// Limits implements nbd.Device.
func (d device) Limits() blk.Limits { return d.Root.Edge().Caps().Limits }

// running is the NBD server, or nil.
func (t *Table) running() *nbd.Server {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.server
}

// StartNBD starts the NBD server on addr. maxConns nil means nbd.DefaultMaxConns, 0 no
// bound. It blocks while names are looked up. Source: QAPI, nbd-server-start.
func (t *Table) StartNBD(ctx context.Context, addr *types.SocketAddress, maxConns *uint32) error {
	t.mu.Lock()
	if t.server != nil || t.starts {
		t.mu.Unlock()
		return errors.New("NBD server already running")
	}
	if t.closed {
		t.mu.Unlock()
		return errors.New("The daemon is shutting down")
	}
	t.starts = true
	mode := t.opts.SocketMode
	t.mu.Unlock()
	l, err := listen(ctx, addr, mode)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.starts = false
	if err != nil {
		return err
	}
	if t.closed {
		l.Close()
		return errors.New("The daemon is shutting down")
	}
	o := t.opts.NBD
	o.Idle, o.Log = t.opts.Idle, t.opts.Log
	switch {
	case maxConns != nil:
		o.MaxConns = *maxConns
	case o.MaxConns == 0:
		o.MaxConns = nbd.DefaultMaxConns
	}
	t.server = nbd.Serve(l, o)
	return nil
}

// Flatten turns the older form of an address into the newer one.
func Flatten(a *types.SocketAddressLegacy) *types.SocketAddress {
	f := &types.SocketAddress{Type: a.Type}
	switch u := a.U.(type) {
	case *types.InetSocketAddressWrapper:
		f.U = &u.Data
	case *types.UnixSocketAddressWrapper:
		f.U = &u.Data
	case *types.StringWrapper:
		f.U = &u.Data
	}
	return f
}

func listen(ctx context.Context, addr *types.SocketAddress, mode os.FileMode) (net.Listener, error) {
	switch a := addr.U.(type) {
	case *types.UnixSocketAddress:
		l, _, err := sockets.ListenUnix(sockets.UnixAddr{
			Path:     a.Path,
			Abstract: isSet(a.Abstract),
			Padded:   a.Tight != nil && !*a.Tight,
			Mode:     mode,
		})
		return l, err
	case *types.InetSocketAddress:
		// keep-alive has no effect on a listener, as in the reference.
		return nbd.ListenInet(ctx, nbd.InetAddr{
			Host: a.Host, Port: a.Port, To: a.To, IPv4: a.Ipv4, IPv6: a.Ipv6,
			Numeric: isSet(a.Numeric), Multipath: isSet(a.Mptcp),
		})
	case *types.String:
		fd, err := strconv.Atoi(a.Str)
		if err != nil || fd < 0 {
			return nil, fmt.Errorf("Unable to parse FD number %s", a.Str)
		}
		return nbd.ListenFD(fd)
	}
	return nil, fmt.Errorf("socket address type '%s' is not supported", addr.Type)
}

// StopNBD removes all NBD exports, drops all clients and removes the socket. It waits for clients'
// requests no longer than ctx and Grace. Source: QAPI, nbd-server-stop.
func (t *Table) StopNBD(ctx context.Context) error {
	t.mu.Lock()
	s := t.server
	t.server = nil
	t.mu.Unlock()
	if s == nil {
		return nbd.ErrNotRunning
	}
	s.Close()
	t.removeAll(ctx)
	wctx, cancel := context.WithTimeout(ctx, Grace)
	defer cancel()
	s.Wait(wctx)
	return nil
}
