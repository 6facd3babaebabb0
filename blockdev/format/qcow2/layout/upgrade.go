package layout

// Complete makes an entry of the snapshot table have all that version 3 asks for. It tells whether
// that has changed it.
func (s *Snapshot) Complete() bool {
	const need = 16 // bytes of extra data
	if s.raw == nil || s.extra >= need {
		return false
	}
	s.raw, s.rawLen = nil, 0
	return true
}
