package fuse

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"

	"qblockd/blockdev/export"
	"qblockd/graph"
	"qblockd/graph/perm"
	"qblockd/schema/types"
)

// Type is the export type "fuse".
type Type struct {
	log *slog.Logger

	mu     sync.Mutex
	closed bool // +checklocks:mu
	// mountpoints in use, resolved
	paths map[string]struct{} // +checklocks:mu
}

var _ export.Type = (*Type)(nil)

// NewType makes the type known to t.
func NewType(t *export.Table, log *slog.Logger) *Type {
	typ := &Type{log: log, paths: map[string]struct{}{}}
	t.Register(types.BlockExportTypeFuse, typ)
	return typ
}

var errShutdown = errors.New("The daemon is shutting down")

// Check implements export.Type. It looks at the mountpoint, which blocks as long as its file system
// does, and leaves its resolved path in the options: the working folder may change.
func (t *Type) Check(_ *graph.Node, o *types.BlockExportOptions) ([]*graph.Node, error) {
	f := o.U.(*types.BlockExportOptionsFuse)
	if err := t.vacant(f.Mountpoint, f.Mountpoint); err != nil {
		return nil, err
	}
	path, err := checkMountpoint(f.Mountpoint)
	if err == nil {
		err = t.vacant(f.Mountpoint, path)
	}
	if err != nil {
		return nil, err
	}
	f.Mountpoint = path
	return nil, nil
}

// Claim implements export.Type. What clients may write they may truncate, too; but that is claimed
// when one does, so that jobs and exports that forbid it can come and go.
func (t *Type) Claim(o *types.BlockExportOptions, need perm.Perm) perm.Claim {
	if types.Or(o.U.(*types.BlockExportOptionsFuse).Growable, false) {
		need |= perm.Resize
	}
	return perm.Claim{Need: need, Share: perm.All}
}

// vacant tells whether no export of ours is at path, which the client calls name.
func (t *Type) vacant(name, path string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.vacantLocked(name, path)
}

// +checklocks:t.mu
func (t *Type) vacantLocked(name, path string) error {
	if t.closed {
		return errShutdown
	}
	if _, taken := t.paths[path]; taken {
		return fmt.Errorf("There already is a FUSE export on '%s'", name)
	}
	return nil
}

// take reserves a mountpoint.
func (t *Type) take(name, path string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.vacantLocked(name, path)
	if err == nil {
		t.paths[path] = struct{}{}
	}
	return err
}

func (t *Type) release(path string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.paths, path)
}

// Serve implements export.Type.
func (t *Type) Serve(x *export.Export, _ *graph.Hold) (export.Server, error) {
	f := x.Options.U.(*types.BlockExportOptionsFuse)
	path := f.Mountpoint // as Check has left it
	if err := t.take(path, path); err != nil {
		return nil, err
	}
	m, shared, err := t.mount(path, types.Or(f.AllowOther, types.FuseExportAllowOtherAuto))
	if err != nil {
		t.release(path)
		t.log.Warn("FUSE export could not be mounted", "export", x.Options.ID, "err", err)
		return nil, errMount
	}
	return t.serve(x, m, shared), nil
}

// mount mounts, for all users if it may; shared tells whether it is so.
func (t *Type) mount(path string, allow types.FuseExportAllowOther) (m *mount, shared bool, err error) {
	if allow != types.FuseExportAllowOtherOff {
		if m, err = newMount(path, true); err == nil || allow == types.FuseExportAllowOtherOn {
			return m, true, err
		}
	}
	m, err = newMount(path, false)
	return m, false, err
}

// Close implements export.Type.
func (t *Type) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
}
