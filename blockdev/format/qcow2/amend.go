package qcow2

import (
	"context"
	"errors"
	"math/bits"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/format/qcow2/layout"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// What is changed in an image beside its keys, while its node is quiet:
//
//	version up -> refcount width -> data file -> backing -> lazy refcounts -> version down
//
// Each is whole when the next begins; after a crash the image has some of them.

// quietly is a Participant that does its work while everything is drained.
type quietly func(ctx context.Context) error

// Prepare implements graph.Participant.
func (f quietly) Prepare(ctx context.Context) error { return f(ctx) }

// Commit implements graph.Participant.
func (quietly) Commit() {}

// Abort implements graph.Participant.
func (quietly) Abort() {}

var _ graph.Participant = quietly(nil)

// amendImage begins to change all but the keys.
func (d *Driver) amendImage(a *driver.Amendment, o *types.BlockdevAmendOptionsQcow2) (*driver.Amending, error) {
	switch {
	case o.Encrypt != nil:
		return nil, errors.New("Keys cannot be changed together with other options")
	case a.Node.ReadOnly():
		return nil, errors.New("Block node is read-only")
	}
	return &driver.Amending{
		Do: func(ctx context.Context, started func()) error {
			started()
			tx := a.Graph.Begin(ctx)
			defer tx.Abort()
			if err := tx.Drain(a.Node); err != nil {
				return err
			}
			tx.Join(quietly(func(ctx context.Context) error { return (&amender{d.image}).amendTo(&blk.Req{Ctx: ctx}, o) }))
			err := tx.Commit()
			a.Node.Bump()
			return err
		},
		End: func() {},
	}, nil
}

var errDamaged = errors.New("The image is damaged: check it first")

// amender changes an image.
type amender struct{ *image }

// amendTo makes the changes, in QEMU's order and with its texts. No requests run.
func (s *amender) amendTo(r *blk.Req, o *types.BlockdevAmendOptionsQcow2) error {
	s.marking.Lock()
	defer s.marking.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	version, order, err := s.amendable(o)
	if err != nil {
		return err
	}
	if err := s.vetAll(r); err != nil {
		return err
	}
	if s.wrong.n > 0 {
		return errDamaged
	}
	if err := s.flush(r); err != nil {
		return err
	}
	if version > s.hdr.Version {
		if err := s.upgrade(r); err != nil {
			return blk.Errnof(err, "Failed to upgrade the image")
		}
	}
	if order != s.hdr.RefcountOrder {
		if err := s.changeRefcounts(r, order); err != nil {
			return err
		}
	}
	if err := s.amendHeader(r, o); err != nil {
		return blk.Errnof(err, "Could not update qcow2 header")
	}
	if version < s.hdr.Version {
		return s.downgrade(r)
	}
	return nil
}

// amendable checks the options.
// +checklocks:s.mu
func (s *amender) amendable(o *types.BlockdevAmendOptionsQcow2) (version, order uint32, err error) {
	version, order = s.hdr.Version, s.hdr.RefcountOrder
	if o.Version != nil {
		version = 3
		if *o.Version == types.BlockdevQcow2VersionV2 {
			version = 2
		}
	}
	if n := o.RefcountBits; n != nil {
		if *n < 1 || *n > 64 || bits.OnesCount64(uint64(*n)) != 1 {
			return 0, 0, errors.New("Refcount width must be a power of two and may not exceed 64 bits")
		}
		order = uint32(bits.TrailingZeros64(uint64(*n)))
	}
	backing := s.backName
	switch {
	case o.DataFile != nil && !s.geo.External:
		err = errors.New("data-file can only be set for images that use an external data file")
	case pick(o.DataFileRaw, false) && !s.hdr.Raw():
		err = errors.New("data-file-raw cannot be set on existing images")
	case o.RefcountBits != nil && order != 4 && version < 3:
		err = errors.New("Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)")
	case o.BackingFmt != nil && o.BackingFile == nil, o.BackingFile != nil && *o.BackingFile != backing:
		err = errors.New("Cannot amend the backing file")
	case o.BackingFmt != nil && len(*o.BackingFmt) > layout.MaxBackingFormat:
		err = errInval
	case pick(o.LazyRefcounts, false) && version < 3 && s.hdr.Version < 3:
		err = errors.New("Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)")
	case version < 3:
		err = s.downgradable(order)
	}
	return version, order, err
}

// downgradable tells why an image cannot have version 2.
// +checklocks:s.mu
func (s *amender) downgradable(order uint32) error {
	stored := len(s.stored) > 0
	if s.keeper != nil {
		s.keeper.names(func(string) { stored = true })
	}
	const fine = layout.IncompatDirty
	switch {
	case s.geo.External:
		return errors.New("Cannot downgrade an image with a data file")
	case s.hdr.IncompatibleFeatures&^fine != 0:
		return errors.New("Cannot downgrade an image with incompatible features set")
	case s.hdr.CryptMethod == layout.CryptLUKS:
		return errors.New("Cannot downgrade an image with LUKS encryption")
	case stored:
		return errors.New("Cannot store dirty bitmaps in qcow2 v2 files")
	case order != 4:
		return errors.New("compat=0.10 requires refcount_bits=16")
	}
	for i := range s.snaps {
		if sn := &s.snaps[i]; sn.VMStateSize > 1<<32-1 || sn.DiskSize != s.hdr.Size {
			return errors.New("Internal snapshots prevent downgrade of image")
		}
	}
	return nil
}

// amendHeader changes what is in the header alone.
// +checklocks:s.mu
func (s *amender) amendHeader(r *blk.Req, o *types.BlockdevAmendOptionsQcow2) error {
	lazy := o.LazyRefcounts
	if lazy != nil && !*lazy {
		if err := s.markClean(r); err != nil {
			return err
		}
	}
	return s.newHeader(r, func(h *layout.Header, x *layout.Extensions) {
		if lazy != nil {
			h.CompatibleFeatures &^= layout.CompatLazyRefcounts
			if *lazy {
				h.CompatibleFeatures |= layout.CompatLazyRefcounts
			}
		}
		if o.DataFile != nil {
			x.DataFile = *o.DataFile
		}
		if o.DataFileRaw != nil && !*o.DataFileRaw {
			h.AutoclearFeatures &^= layout.AutoclearDataFileRaw
		}
		if o.BackingFmt != nil {
			x.BackingFormat = string(*o.BackingFmt)
		}
	})
}

// newHeader writes the header as change makes it. After an error it is as it was.
// +checklocks:s.mu
func (s *amender) newHeader(r *blk.Req, change func(h *layout.Header, x *layout.Extensions)) error {
	hdr, ext := *s.hdr, *s.ext
	change(s.hdr, s.ext)
	if err := s.updateHeader(r); err != nil {
		*s.hdr, *s.ext = hdr, ext
		if s.updateHeader(patient(r)) != nil {
			_ = s.corrupt(r, -1, -1, "Which header the image has is not known")
		}
		return err
	}
	s.version = s.hdr.Version
	s.geo, s.rawBit = s.hdr.Geometry(), s.hdr.Raw()
	if s.raw = s.raw && s.rawBit; s.geo.External {
		s.dataName = s.ext.DataFile
	}
	set, err := resolve(&s.options, s.hdr, s.unmap)
	if err == nil {
		s.set.lazy = set.lazy
	}
	s.publish()
	return err
}

// upgrade makes the image one of version 3.
// +checklocks:s.mu
func (s *amender) upgrade(r *blk.Req) error {
	list, changed := make([]layout.Snapshot, len(s.snaps)), false
	for i := range s.snaps {
		list[i] = s.snaps[i]
		changed = list[i].Complete() || changed
	}
	if changed {
		defer s.giveBack(r)
		if err := s.writeSnapshots(r, list); err != nil {
			return err
		}
		if err := s.flush(r); err != nil {
			return err
		}
	}
	return s.newHeader(r, func(h *layout.Header, _ *layout.Extensions) { h.Version = 3 })
}

// downgrade makes the image one of version 2, which cannot say of clusters that they are zeroes.
// +checklocks:s.mu
func (s *amender) downgrade(r *blk.Req) error {
	if err := s.expandZeroes(r); err != nil {
		return err
	}
	if err := s.flush(r); err != nil {
		return err
	}
	if err := s.markClean(r); err != nil {
		return err
	}
	return s.newHeader(r, func(h *layout.Header, _ *layout.Extensions) {
		h.Version, h.Unknown = 2, nil
		h.CompatibleFeatures, h.AutoclearFeatures = 0, 0
	})
}

// expandZeroes makes clusters that are zeroes unallocated, or, above a backing file, clusters with
// zeroes in them. In what snapshots share there must be none.
// +checklocks:s.mu
func (s *amender) expandZeroes(r *blk.Req) error {
	c := s.newCounter(r, &CheckResult{})
	if err := s.countMeta(c); err != nil {
		return err
	}
	buf := make([]byte, s.cs)
	for _, k := range c.tabs {
		if err := s.readL2(r, k<<s.cb, buf); err != nil {
			return err
		}
		for i := int64(0); len(s.snaps) > 0 && i < s.cs; i += 8 {
			if x := s.geo.KindOf(be.Uint64(buf[i:])); x == layout.ZeroPlain || x == layout.ZeroAlloc {
				return errors.New("Internal snapshots prevent downgrade of image")
			}
		}
	}
	if len(s.snaps) > 0 {
		return nil
	}
	for li, e := s.l1.next(0); e != 0; li, e = s.l1.next(li + 1) {
		for gc := li << s.geo.L2Bits(); gc < (li+1)<<s.geo.L2Bits() && gc<<s.cb < s.size.Load(); gc++ {
			if err := s.expandZero(r, gc); err != nil {
				return blk.Errnof(err, "Failed to turn zero into data clusters")
			}
		}
	}
	return nil
}

// +checklocks:s.mu
func (s *amender) expandZero(r *blk.Req, gc int64) error {
	if err := ended(r); err != nil {
		return err
	}
	if err := s.room(r); err != nil {
		return err
	}
	t, err := s.loadSlice(r, gc)
	if t == nil || err != nil {
		return err
	}
	e := s.entry(t, s.l2Index(gc))
	if k := s.geo.KindOf(e); k != layout.ZeroPlain && k != layout.ZeroAlloc {
		return nil
	}
	if s.backName != "" || s.back() != nil {
		b := make([]byte, min(s.cs, s.size.Load()-gc<<s.cb))
		s.unlocked(func() { err = s.WriteAt(r, blk.Buf(b), gc<<s.cb, 0) })
		return err
	}
	s.setEntry(t, s.l2Index(gc), 0)
	s.freeEntry(r, e, discardOther)
	return nil
}
