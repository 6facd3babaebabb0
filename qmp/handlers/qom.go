package handlers

import (
	"context"

	"qblockd/blockdev/object"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// Qom executes the commands for objects.
type Qom struct{ Objects *object.Registry }

// QomList implements types.QomHandler.
func (h Qom) QomList(_ context.Context, a *types.QomListArgs) ([]*types.ObjectPropertyInfo, error) {
	return h.Objects.List(a.Path)
}

// QomGet implements types.QomHandler.
func (h Qom) QomGet(_ context.Context, a *types.QomGetArgs) (value.Value, error) {
	return h.Objects.Get(a.Path, a.Property)
}

// QomSet implements types.QomHandler.
func (h Qom) QomSet(_ context.Context, a *types.QomSetArgs) error {
	return h.Objects.Set(a.Path, a.Property, a.Value)
}

// QomListTypes implements types.QomHandler.
func (h Qom) QomListTypes(_ context.Context, a *types.QomListTypesArgs) ([]*types.ObjectTypeInfo, error) {
	return h.Objects.Types(types.Or(a.Implements, ""), types.Or(a.Abstract, false)), nil
}

// QomListProperties implements types.QomHandler.
func (h Qom) QomListProperties(_ context.Context, a *types.QomListPropertiesArgs) ([]*types.ObjectPropertyInfo, error) {
	return h.Objects.TypeProperties(a.Typename)
}

// ObjectAdd implements types.QomHandler. A secret in the command is overwritten.
func (h Qom) ObjectAdd(_ context.Context, a *types.ObjectOptions) error {
	if p, ok := a.U.(*types.SecretProperties); ok && p.Data != nil {
		defer value.Wipe(*p.Data)
	}
	return h.Objects.Add(a)
}

// ObjectDel implements types.QomHandler.
func (h Qom) ObjectDel(_ context.Context, a *types.ObjectDelArgs) error { return h.Objects.Del(a.ID) }
