package graph

// ioState is the data plane's part of a node.
type ioState struct{}

// opened is called once, by SetDriver, on the still hidden node; refreshed after a reopen, while drained.
func (s *ioState) opened(n *Node)    {}
func (s *ioState) refreshed(n *Node) {}
