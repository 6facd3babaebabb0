package graph

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"

	"qblockd/schema/types"
)

// maxNodeName is the longest node name in bytes.
const maxNodeName = 31

// GivenName is the node name that an optional argument gives, or "" if it is left out. Error: it is
// given and empty.
func GivenName(arg *string) (string, error) {
	switch {
	case arg == nil:
		return "", nil
	case *arg == "":
		return "", errors.New("Invalid node-name: ''")
	}
	return *arg, nil
}

// takeName enters n under name, or under a generated one if name is empty.
// +checklocks:g.mu
func (g *Graph) takeNameLocked(name string, n *Node) error {
	if name == "" {
		// Generated names cannot be given by users: they never clash.
		name = "#block" + strconv.FormatUint(g.autoID, 10) + fmt.Sprintf("%02d", rand.IntN(100))
		g.autoID++
	} else if !types.WellFormedID(name) {
		return fmt.Errorf("Invalid node-name: '%s'", name)
	}
	if h, taken := g.names[name]; taken {
		if h.node == nil {
			return fmt.Errorf("node-name=%s is conflicting with a %s", name, h.who)
		}
		return fmt.Errorf("Duplicate nodes with node-name='%s'", name)
	}
	if len(name) > maxNodeName {
		return fmt.Errorf("Node name too long")
	}
	n.name = name
	g.names[name] = holder{node: n}
	return nil
}

// ReserveName takes a name of the name space that nodes share with backends. who says
// what holds it, as in "node-name=X is conflicting with a device id". Error: the name is taken.
func (g *Graph) ReserveName(name, who string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if h, taken := g.names[name]; taken {
		if h.node == nil {
			return fmt.Errorf("Device with id '%s' already exists", name)
		}
		return fmt.Errorf("Device name '%s' conflicts with an existing node name", name)
	}
	g.names[name] = holder{who: who}
	return nil
}

// ReleaseName gives back what ReserveName took.
func (g *Graph) ReleaseName(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if h, taken := g.names[name]; taken && h.node == nil {
		delete(g.names, name)
	}
}
