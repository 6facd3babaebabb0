package graph

// signal is something that some wait for. Its methods are called under the lock of who has it.
type signal struct{ c chan struct{} } // made by the first who waits

// wait is closed when it comes.
func (s *signal) wait() <-chan struct{} {
	if s.c == nil {
		s.c = make(chan struct{})
	}
	return s.c
}

// send ends the waiting of all who do.
func (s *signal) send() {
	if s.c != nil {
		close(s.c)
		s.c = nil
	}
}
