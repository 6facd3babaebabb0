package backup

// ClosesTarget makes the job one whose target goes with it, as with drive-backup.
func (s *Step) ClosesTarget() { s.closes = true }
