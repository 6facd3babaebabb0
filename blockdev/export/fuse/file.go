package fuse

import (
	"context"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/graph/perm"
)

// attrValid is for how many seconds the kernel may believe attributes.
const attrValid = 1

// init agrees with the kernel on how to go on.
func (r *reader) init() {
	var a initArg
	if err := a.parse(r.q.arg); err != nil || a.major < protoMajor {
		r.fail(syscall.EPROTO)
		return
	}
	const wanted = initAsyncRead | initAtomicTrunc | initBigWrites | initAutoInvalData | initAsyncDIO | initMaxPages |
		initExt | initDirectMmap
	reply := initReply{flags: a.flags & wanted, readahead: max(a.readahead, maxData), requests: background}
	reply.maxWrite = maxData
	if a.flags&initMaxPages == 0 {
		reply.maxWrite = 32 * pageSize // what an older kernel has
	}
	r.send(reply.appendTo(r.reply[:outHeaderSize]))
}

// getattr answers with the attributes.
func (r *reader) getattr() {
	a := attr{
		size: r.root.Size(), now: time.Now().Unix(), blockSize: pageSize,
		allocated: graph.Allocated(r.root.Node(), isLeaf, allocated),
	}
	if a.allocated <= 0 {
		a.allocated = a.size
	}
	r.mu.Lock()
	a.mode, a.uid, a.gid = r.mode, r.uid, r.gid
	r.mu.Unlock()
	r.send(a.appendTo(r.reply[:outHeaderSize], attrValid))
}

func isLeaf(n *graph.Node) bool { return n.Kind() == graph.Protocol }

func allocated(_ *graph.Node, s graph.Sizer) int64 {
	size, err := s.ActualSize()
	if err != nil {
		return -1
	}
	return size
}

// setattr sets the size and what says who may open the file, as far as they really may.
func (r *reader) setattr() {
	var a setArg
	err := a.parse(r.q.arg)
	if err == nil {
		err = r.maySet(&a)
	}
	if err == nil && a.valid&setSize != 0 {
		r.moreReaders()
		err = r.resize(func(int64) (int64, blk.Prealloc) { return a.size, blk.PreallocOff })
	}
	if err != nil {
		r.fail(answerErrno(err))
		return
	}
	r.mu.Lock()
	if a.valid&setMode != 0 {
		r.mode = unix.S_IFREG | a.mode&0o7777
	}
	if a.valid&setUID != 0 {
		r.uid = a.uid
	}
	if a.valid&setGID != 0 {
		r.gid = a.gid
	}
	r.mu.Unlock()
	r.getattr()
}

// maySet checks a whole change before any of it is made. The errors are those of QEMU.
func (r *reader) maySet(a *setArg) error {
	known := uint32(setSize | setMode)
	if r.shared {
		known |= setUID | setGID
	}
	switch {
	case a.valid&^known != 0:
		return syscall.EOPNOTSUPP
	case a.valid&setMode != 0 && !r.shared && a.mode&0o077 != 0:
		return syscall.EPERM
	case a.valid&setMode != 0 && !r.writable && a.mode&0o222 != 0:
		return syscall.EROFS
	case a.valid&setSize != 0 && !r.writable:
		return syscall.EACCES
	}
	return nil
}

// open answers to opening. O_DIRECT gets no page cache, and writes side by side.
func (r *reader) open() {
	flags, err := openFlags(r.q.arg)
	if err != nil {
		r.fail(answerErrno(err))
		return
	}
	var how uint32
	if flags&unix.O_DIRECT != 0 {
		how = openDirect | openParallelWrites
	}
	if isOurs(r.q.thread) {
		how |= openNoFlush
	}
	b := le.AppendUint64(r.reply[:outHeaderSize], 0) // no handle
	b = le.AppendUint32(b, how)
	r.send(le.AppendUint32(b, 0))
}

// isOurs tells whether a thread is one of this process: a node of ours opens the file, and flushes
// it by itself. When the process is killed, the kernel closes that file, and would wait with
// closing the connection for the answer to a flush that nobody gives any more.
func isOurs(thread uint32) bool {
	var st unix.Stat_t
	return thread != 0 && unix.Stat("/proc/self/task/"+strconv.FormatUint(uint64(thread), 10), &st) == nil
}

// resize changes the size of the node, which is quiet meanwhile, as is block_resize. to makes the
// new size of the present one; the same: nothing is done.
func (r *reader) resize(to func(now int64) (int64, blk.Prealloc)) error {
	n := r.root.Node()
	switch {
	case n == nil:
		return blk.ErrClosed
	case n.Inactive():
		return syscall.EPERM // its claims wait for it to become active
	}
	hold, err := r.root.Graph().HoldNodes(r.ctx, n)
	if err != nil {
		return err
	}
	defer hold.Release()
	now := r.root.Size()
	size, prealloc := to(now)
	if size == now {
		return nil
	}
	back, err := r.claimResize()
	if err != nil {
		return err
	}
	defer back()
	undrain, err := r.root.Graph().Drain(r.ctx, n)
	if err != nil {
		return err
	}
	defer undrain()
	return r.root.Resize(context.WithoutCancel(r.ctx), size, true, prealloc)
}

// claimResize claims the right to change the size for a while, where the export has not got it.
// EPERM: others forbid it.
func (r *reader) claimResize() (back func(), err error) {
	e := r.root.Edge()
	was := e.Claim()
	if was.Need&perm.Resize != 0 {
		return func() {}, nil
	}
	set := func(ctx context.Context, c perm.Claim) error {
		return r.root.Graph().Do(ctx, func(tx *graph.Tx) error { return tx.SetClaim(e, c) })
	}
	more := was
	more.Need |= perm.Resize
	if err := set(r.ctx, more); err != nil {
		if r.ctx.Err() != nil {
			return nil, err
		}
		return nil, syscall.EPERM
	}
	return func() {
		if err := set(context.WithoutCancel(r.ctx), was); err != nil {
			r.log.Error("FUSE export keeps the right to resize its node", "export", r.export.Options.ID, "err", err)
		}
	}, nil
}
