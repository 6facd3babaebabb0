package backup

// ClosesTarget makes the job one whose target goes with it, as with drive-backup.
func (s *Step) ClosesTarget() { s.closes = true }

// GiveUpAfter changes after how many bytes the source gives up what was copied, until undo.
func GiveUpAfter(n int64) (undo func()) {
	was := giveUpAfter
	giveUpAfter = n
	return func() { giveUpAfter = was }
}
