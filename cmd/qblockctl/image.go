package main

import (
	"context"
	"fmt"
	"path/filepath"
)

// imageNode is the node of an image file on a daemon that this program has started.
const imageNode = "image"

// imageSpec is how an image file is opened.
type imageSpec struct {
	file, format string // "": the format is guessed
	password     string // a file with it, or ""
	readOnly     bool
	chain        bool   // with its backing file, which is left alone otherwise
	snapshot     string // show this one inside the image, or ""
}

// open opens an image file as imageNode.
func (o *own) open(ctx context.Context, s imageSpec) (err error) {
	if s.format == "" {
		if s.format, err = imageFormat(s.file); err != nil {
			return err
		}
	}
	path, err := filepath.Abs(s.file)
	if err != nil {
		return err
	}
	node := map[string]any{
		"driver": s.format, "node-name": imageNode, "read-only": s.readOnly,
		"file": map[string]any{"driver": "file", "filename": path},
	}
	if s.format == "qcow2" && !s.chain {
		node["backing"] = nil
	}
	if s.snapshot != "" {
		node["x-qblockd-snapshot"] = s.snapshot
	}
	if err := o.unlock(ctx, node, s.password); err != nil {
		return err
	}
	if _, err = o.execute(ctx, "blockdev-add", node); err != nil {
		return fmt.Errorf("Could not open '%s': %w", s.file, err)
	}
	return nil
}
