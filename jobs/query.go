package jobs

import (
	"syscall"

	"qblockd/graph/blk"
	"qblockd/jobs/visible"
	"qblockd/schema/types"
)

// Query describes all jobs, newest first (query-jobs).
func (m *Manager) Query() []*types.JobInfo {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*types.JobInfo, 0, len(m.jobs))
	for _, j := range m.jobs {
		info := &types.JobInfo{
			ID: j.id, Type: j.typ, Status: types.JobStatus(j.st.Status.String()),
			CurrentProgress: j.current.Load(), TotalProgress: j.total.Load(), Error: j.errorTextLocked(),
			XQblockdCheck: j.check.Load(),
		}
		out = append(out, info)
	}
	return out
}

// QueryBlock describes all block jobs, newest first (query-block-jobs).
func (m *Manager) QueryBlock() []*types.BlockJobInfo {
	out, mirrors := m.queryBlock()
	for info, s := range mirrors {
		info.U = &types.BlockJobInfoMirror{ActivelySynced: s.ActivelySynced()}
	}
	return out
}

// queryBlock describes all block jobs, and says whom to ask for the rest about mirrors.
func (m *Manager) queryBlock() ([]*types.BlockJobInfo, map[*types.BlockJobInfo]Syncer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*types.BlockJobInfo, 0, len(m.jobs))
	mirrors := map[*types.BlockJobInfo]Syncer{}
	for _, j := range m.jobs {
		if j.block == nil {
			continue
		}
		info := &types.BlockJobInfo{
			Type: j.typ, Device: j.id, Len: j.total.Load(), Offset: j.current.Load(),
			Busy: !j.waiting.Load(), Speed: j.block.speed,
			Paused:   j.st.PauseCount > 0 || visible.ShownPaused(j.seenAs, j.st.Status),
			IoStatus: j.block.ioStatus, Ready: j.st.Status.IsReady(),
			Status:       types.JobStatus(j.st.Status.String()),
			AutoFinalize: j.st.AutoFinalize, AutoDismiss: j.st.AutoDismiss, Error: j.errorTextLocked(),
		}
		out = append(out, info)
		if j.typ == types.JobTypeMirror {
			info.U = &types.BlockJobInfoMirror{}
			if s, ok := j.runner.(Syncer); ok {
				mirrors[info] = s
			}
		}
	}
	return out, mirrors
}

func (j *Job) errorTextLocked() *string {
	if !j.st.Failed || j.err == nil {
		return nil
	}
	text := j.err.Error()
	if errno, bare := j.err.(syscall.Errno); bare {
		text = blk.ErrnoText(errno)
	}
	return &text
}

// BlockJobs are the IDs of all block jobs, newest first.
func (m *Manager) BlockJobs() (ids []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, j := range m.jobs {
		if j.block != nil {
			ids = append(ids, j.id)
		}
	}
	return ids
}
