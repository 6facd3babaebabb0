package object

import (
	"errors"
	"strings"

	"qblockd/blockdev/filter/throttle"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// limits is a throttle-group.
type limits struct{ g *throttle.Group }

func newLimits(id string, o *types.ThrottleGroupProperties) (*limits, error) {
	l, err := throttle.FromOptions(o)
	if err != nil {
		return nil, err
	}
	return &limits{throttle.NewGroup(id, l, nil)}, nil
}

func (l *limits) typ() string { return "throttle-group" }

func (l *limits) get(property string) (value.Value, error) {
	now := l.g.Limits()
	if property == "limits" {
		v, err := value.Parse(string(now.Shown().AppendJSON(nil)))
		if err != nil {
			panic("object: " + err.Error())
		}
		return v, nil
	}
	if n, ok := now.Get(property); ok {
		return n, nil
	}
	return nil, errNotReadable
}

// set changes several limits at once only: there are combinations that no single change could lead
// to.
func (l *limits) set(property string, v value.Value) error {
	if strings.HasPrefix(property, "x-") {
		return errors.New("Property cannot be set after initialization")
	}
	if property != "limits" {
		return errReadOnly
	}
	d := &value.Dict{}
	d.Set(property, v)
	o, err := types.DecodeThrottleGroupProperties(d, types.ModeQObject)
	if err != nil {
		return err
	}
	now := l.g.Limits()
	if err := now.Apply(o.Limits); err != nil {
		return err
	}
	l.g.SetLimits(now)
	return nil
}

func (l *limits) retire() bool { return l.g.Retire() }
