package hostile

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"time"
)

// job runs a job to its end, or for a while.
func (r *run) job(command string, a args) (ok bool, err error) {
	r.names++
	id := fmt.Sprintf("job%d", r.names)
	a["job-id"] = id
	if ok, err = r.try(command, a); !ok || err != nil {
		return false, err
	}
	began := time.Now()
	cancelled := false
	patience := time.Second
	if a["sync"] == "none" {
		patience = 0 // it has no end
	}
	for {
		r.q.SetDeadline(began.Add(patience))
		if cancelled {
			r.q.SetDeadline(began.Add(patience + r.s.limits.Deadline))
		}
		e, err := r.q.Next()
		var d struct{ ID, Device, Status, Error string }
		switch {
		case os.IsTimeout(err) && !cancelled:
			cancelled = true
			if _, err := r.try("block-job-cancel", args{"device": id, "force": true}); err != nil {
				return false, err
			}
			continue
		case err != nil:
			return false, &Failure{"a job does not end", command + ": " + err.Error(), true}
		case json.Unmarshal(e.Data, &d) != nil:
			continue
		case e.Name == "BLOCK_JOB_READY" && d.Device == id:
			c := args{"device": id}
			verb := "block-job-complete"
			if command == "blockdev-mirror" {
				verb, c["force"] = "block-job-cancel", true
			}
			if _, err := r.try(verb, c); err != nil {
				return false, err
			}
		case e.Name == "BLOCK_JOB_COMPLETED" && d.Device == id:
			ok = d.Error == ""
			r.note("%s ended: %q", id, d.Error)
		case e.Name == "BLOCK_JOB_CANCELLED" && d.Device == id:
			ok = false
		case e.Name == "JOB_STATUS_CHANGE" && d.ID == id && (d.Status == "concluded"):
			if command == "x-blockdev-amend" || command == "blockdev-create" {
				_, err := r.try("job-dismiss", args{"id": id})
				return ok, err
			}
		case e.Name == "JOB_STATUS_CHANGE" && d.ID == id && d.Status == "null":
			return ok && !cancelled, nil
		}
	}
}

func (r *run) stream() error {
	_, err := r.job("block-stream", args{"device": r.top()})
	return err
}

// target adds a node that takes what a job copies, of the right size.
func (r *run) target(f func() error) error {
	ok, err := r.try("blockdev-add", args{"driver": "null-co", "node-name": "null", "size": r.size, "read-zeroes": true})
	if !ok || err != nil {
		return err
	}
	if err := f(); err != nil {
		return err
	}
	_, err = r.try("blockdev-del", args{"node-name": "null"})
	return err
}

func (r *run) backup() error {
	return r.target(func() error {
		a := args{"device": r.top(), "target": "null", "sync": []string{"full", "top", "none"}[r.r.IntN(3)]}
		if r.c.Base.Bitmaps && r.r.IntN(2) == 0 {
			a["sync"], a["bitmap"] = "incremental", "b0"
		}
		_, err := r.job("blockdev-backup", a)
		return err
	})
}

func (r *run) mirror() error {
	return r.target(func() error {
		_, err := r.job("blockdev-mirror", args{"device": r.top(), "target": "null", "sync": "full", "copy-mode": []string{"background", "write-blocking"}[r.r.IntN(2)]})
		return err
	})
}

func (r *run) changeBacking() error {
	names := []string{imageName, "back.raw", "none", "", "../canary/raw"}
	ok, err := r.try("change-backing-file", args{"device": r.top(), "image-node-name": r.top(), "backing-file": names[r.r.IntN(len(names))]})
	r.renamed = r.renamed || ok
	return err
}

func (r *run) amend() error {
	o := args{"driver": "qcow2"}
	switch r.r.IntN(3) {
	case 0:
		o["lazy-refcounts"] = r.r.IntN(2) == 0
	case 1:
		o["version"] = []string{"v2", "v3"}[r.r.IntN(2)]
	}
	_, err := r.job("x-blockdev-amend", args{"node-name": r.nodes[0], "options": o, "force": r.r.IntN(2) == 0})
	return err
}

func (r *run) reopen() error {
	if r.over || len(r.nodes) > 1 {
		return nil
	}
	o := r.options("d")
	_, err := r.try("blockdev-reopen", args{"options": []args{o}})
	return err
}

// overlay takes an external snapshot.
func (r *run) overlay() error {
	r.names++
	name := fmt.Sprintf("o%d", r.names)
	ok, err := r.try("blockdev-snapshot-sync", args{"node-name": r.top(), "snapshot-file": name + ".qcow2", "snapshot-node-name": name})
	if ok {
		if r.below == nil {
			r.m.flushed() // it was
			r.below = maps.Clone(r.m.may)
		}
		r.nodes = append(r.nodes, name)
		r.now = ""
	}
	return err
}

// commit brings what the topmost overlay has into what lies below.
func (r *run) commit() error {
	a := args{"device": r.top()}
	switch {
	case len(r.nodes) > 1:
		a["base-node"] = r.nodes[len(r.nodes)-2]
	case r.over && r.image != "":
		a["base-node"] = r.image
	default:
		return nil
	}
	ok, err := r.job("block-commit", a)
	if !ok || err != nil {
		// Some of it may be in the base, also of what nobody knows, as what was discarded.
		maps.DeleteFunc(r.below, func(s int64, _ []uint64) bool { return r.m.touched[s] || r.m.lost[s] })
		return err
	}
	// What was the base has taken the place of its overlay.
	if len(r.nodes) > 1 {
		// The node is there until it is deleted.
		if _, err := r.try("blockdev-del", args{"node-name": r.top()}); err != nil {
			return err
		}
		if r.nodes = r.nodes[:len(r.nodes)-1]; len(r.nodes) == 1 {
			r.below = nil
		}
	} else {
		r.over, r.now = false, r.image
	}
	return nil
}
