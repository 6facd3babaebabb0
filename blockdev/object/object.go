// Package object holds the objects that clients make by object-add and see as a tree through the
// qom- commands: iothread, a named and bounded group of workers; secret, which gives nothing away,
// and secret_keyring, which has it of the kernel; throttle-group, limits for throttle filters;
// tls-creds-x509 and tls-creds-psk, certificates and keys for TLS; authz-list, authz-listfile and
// authz-simple, which say who may connect.
//
//	/            container
//	/objects     container    what object-add made
//	/chardevs    container    the character devices
package object

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"qblockd/events/panics"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Chardev is a character device as the tree shows it.
type Chardev struct{ Label, Kind string }

// object is what a type of objects does. Properties are those of its type.
type object interface {
	typ() string
	// get reads a property that exists, or returns errNotReadable.
	get(property string) (value.Value, error)
	// set changes a property that exists, or returns errReadOnly.
	set(property string, v value.Value) error
	// retire ends the object, unless it is in use.
	retire() bool
}

// completer is an object that has more to do before it can be used, once its name is known to be
// free.
type completer interface{ complete(r *Registry) error }

// A property cannot be changed or read. Worded by who knows the type.
var (
	errReadOnly    = errors.New("property is not writable")
	errNotReadable = errors.New("property is not readable")
)

// Registry holds all objects. Its methods may be called from any goroutine; none blocks, but Add of
// a secret that is in a file.
type Registry struct {
	chardevs func() []Chardev

	collecting atomic.Bool // see collect

	mu sync.Mutex
	// oldest first
	objects []named // +checklocks:mu
}

type named struct {
	id string
	object
}

// NewRegistry makes an empty registry; chardevs lists the character devices of the tree and may be
// nil.
func NewRegistry(chardevs func() []Chardev) *Registry {
	if chardevs == nil {
		chardevs = func() []Chardev { return nil }
	}
	return &Registry{chardevs: chardevs}
}

var errID = blk.WithHint(errors.New("Parameter 'id' expects an identifier"),
	"Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.")

// Add makes an object (object-add).
func (r *Registry) Add(o *types.ObjectOptions) error {
	x, err := r.make(o)
	if err != nil {
		return err
	}
	if !types.WellFormedID(o.ID) {
		return errID
	}
	duplicate := fmt.Errorf("attempt to add duplicate property '%s' to object (type 'container')", o.ID)
	if c, ok := x.(completer); ok {
		if r.find(o.ID) != nil {
			return duplicate
		}
		if err := c.complete(r); err != nil {
			return err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.findLocked(o.ID) != nil {
		x.retire()
		return duplicate
	}
	r.objects = append(r.objects, named{o.ID, x})
	return nil
}

func (r *Registry) make(o *types.ObjectOptions) (object, error) {
	switch u := o.U.(type) {
	case *types.ThrottleGroupProperties:
		return newLimits(o.ID, u)
	case *types.IothreadProperties:
		return newIothread(u)
	case *types.SecretProperties:
		return newSecret(u), nil
	case *types.SecretKeyringProperties:
		return newKeyringSecret(u)
	case *types.TlsCredsPskProperties:
		return &presharedKeys{p: *u}, nil
	case *types.TlsCredsX509Properties:
		return &certificates{p: *u}, nil
	case *types.AuthZSimpleProperties:
		return &authzSimple{identity: u.Identity}, nil
	case *types.AuthZListProperties:
		return &authzList{p: *u}, nil
	case *types.AuthZListFileProperties:
		return &authzFile{p: *u}, nil
	}
	return nil, fmt.Errorf("invalid object type: %s", o.QomType)
}

// Del forgets an object (object-del).
func (r *Registry) Del(id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.objects, func(x named) bool { return x.id == id })
	switch {
	case i < 0:
		return fmt.Errorf("object '%s' not found", id)
	case !r.objects[i].retire():
		return fmt.Errorf("object '%s' is in use, can not be deleted", id)
	}
	switch r.objects[i].object.(type) {
	case *certificates, *presharedKeys:
		r.collect()
	}
	r.objects = slices.Delete(r.objects, i, i+1)
	return nil
}

// collect has garbage collected soon: the keys of credentials are overwritten with them, which go
// with their last user.
func (r *Registry) collect() {
	if r.collecting.CompareAndSwap(false, true) {
		panics.Go("the end of credentials", func() {
			r.collecting.Store(false)
			runtime.GC()
		}, nil)
	}
}

// find returns the object called id, nil if there is none.
func (r *Registry) find(id string) object {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.findLocked(id)
}

// +checklocks:r.mu
func (r *Registry) findLocked(id string) object {
	for _, x := range r.objects {
		if x.id == id {
			return x.object
		}
	}
	return nil
}

// Iothread finds an iothread object; nil if there is none.
func (r *Registry) Iothread(id string) *Iothread {
	g, _ := r.find(id).(*Iothread)
	return g
}

// Object is what drivers get of an object (driver.Objects); nil if there is none of that name.
func (r *Registry) Object(id string) any {
	switch x := r.find(id).(type) {
	case nil:
		return nil
	case *limits:
		return x.g
	default:
		return x
	}
}
