package types

import (
	"testing"

	"qblockd/events"
)

// Generated events can be emitted as they are.
var _ = []events.Event{JobStatusChangeEvent{}, BlockJobReadyEvent{}, &BlockExportDeletedEvent{}}

func ptr[T any](v T) *T { return &v }

// TestEncode compares with replies of QEMU (7.2), byte for byte.
func TestEncode(t *testing.T) {
	specific := &ImageInfoSpecific{Type: ImageInfoSpecificKindQcow2, U: &ImageInfoSpecificQCow2Wrapper{
		Data: ImageInfoSpecificQCow2{
			Compat: "1.1", CompressionType: Qcow2CompressionTypeZlib, LazyRefcounts: ptr(false), RefcountBits: 16,
			Corrupt: ptr(false), ExtendedL2: ptr(false),
		},
	}}
	node := &BlockDeviceInfo{
		File: "o\"é.qcow2", NodeName: ptr("n"), Ro: true, Drv: "qcow2", BackingFile: ptr("base.qcow2"), BackingFileDepth: 1,
		DetectZeroes: BlockdevDetectZeroesOptionsOff, Cache: BlockdevCacheInfo{Writeback: true},
		Image: ImageInfo{
			Filename: "o\"é.qcow2", Format: "qcow2", DirtyFlag: ptr(false), ActualSize: ptr(int64(200704)), VirtualSize: 2097152,
			ClusterSize: ptr(int64(65536)), BackingFilename: ptr("base.qcow2"), FullBackingFilename: ptr("base.qcow2"),
			BackingFilenameFormat: ptr("qcow2"), FormatSpecific: specific,
			BackingImage: &ImageInfo{
				Filename: "base.qcow2", Format: "qcow2", DirtyFlag: ptr(false), ActualSize: ptr(int64(208896)), VirtualSize: 1048576,
				ClusterSize: ptr(int64(65536)), FormatSpecific: specific,
				Snapshots: []*SnapshotInfo{{ID: "1", Name: "s1", DateSec: 1795231976, DateNsec: 766259000, Icount: ptr(int64(0))}},
			},
		},
	}
	stats := &BlockStats{
		NodeName:       ptr("f"),
		DriverSpecific: &BlockStatsSpecific{Driver: BlockdevDriverFile, U: &BlockStatsSpecificFile{}},
	}
	for _, c := range []struct {
		name      string
		got, want string
	}{
		{"query-named-block-nodes", string(node.AppendJSON(nil)), `{"iops_rd": 0, "detect_zeroes": "off", "image": {"backing-image": {"snapshots": [{"icount": 0, "vm-clock-nsec": 0, "name": "s1", "date-sec": 1795231976, "date-nsec": 766259000, "vm-clock-sec": 0, "id": "1", "vm-state-size": 0}], "virtual-size": 1048576, "filename": "base.qcow2", "cluster-size": 65536, "format": "qcow2", "actual-size": 208896, "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "compression-type": "zlib", "lazy-refcounts": false, "refcount-bits": 16, "corrupt": false, "extended-l2": false}}, "dirty-flag": false}, "backing-filename-format": "qcow2", "virtual-size": 2097152, "filename": "o\"\u00E9.qcow2", "cluster-size": 65536, "format": "qcow2", "actual-size": 200704, "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "compression-type": "zlib", "lazy-refcounts": false, "refcount-bits": 16, "corrupt": false, "extended-l2": false}}, "full-backing-filename": "base.qcow2", "backing-filename": "base.qcow2", "dirty-flag": false}, "iops_wr": 0, "ro": true, "node-name": "n", "backing_file_depth": 1, "drv": "qcow2", "iops": 0, "bps_wr": 0, "write_threshold": 0, "backing_file": "base.qcow2", "encrypted": false, "bps": 0, "bps_rd": 0, "cache": {"no-flush": false, "direct": false, "writeback": true}, "file": "o\"\u00E9.qcow2"}`},
		{"query-blockstats", string(stats.AppendJSON(nil)), `{"stats": {"unmap_operations": 0, "unmap_merged": 0, "failed_zone_append_operations": 0, "flush_total_time_ns": 0, "wr_highest_offset": 0, "wr_total_time_ns": 0, "failed_wr_operations": 0, "failed_rd_operations": 0, "wr_merged": 0, "wr_bytes": 0, "timed_stats": [], "failed_unmap_operations": 0, "zone_append_merged": 0, "failed_flush_operations": 0, "account_invalid": false, "rd_total_time_ns": 0, "invalid_unmap_operations": 0, "flush_operations": 0, "wr_operations": 0, "unmap_bytes": 0, "rd_merged": 0, "rd_bytes": 0, "unmap_total_time_ns": 0, "invalid_flush_operations": 0, "account_failed": false, "zone_append_total_time_ns": 0, "zone_append_operations": 0, "rd_operations": 0, "zone_append_bytes": 0, "invalid_zone_append_operations": 0, "invalid_wr_operations": 0, "invalid_rd_operations": 0}, "node-name": "f", "driver-specific": {"discard-bytes-ok": 0, "discard-nb-ok": 0, "driver": "file", "discard-nb-failed": 0}}`},
		{"x-debug-query-block-graph", string((&XDbgBlockGraph{
			Edges: []*XDbgBlockGraphEdge{{Name: "backing", Parent: 2, Child: 3,
				SharedPerm: []BlockPermission{BlockPermissionResize, BlockPermissionConsistentRead}}},
			Nodes: []*XDbgBlockGraphNode{{ID: 3, Type: XDbgBlockGraphNodeTypeBlockDriver, Name: "#block192"}},
		}).AppendJSON(nil)), `{"edges": [{"name": "backing", "parent": 2, "shared-perm": ["resize", "consistent-read"], "perm": [], "child": 3}], "nodes": [{"name": "#block192", "type": "block-driver", "id": 3}]}`},
		{"JOB_STATUS_CHANGE", string(JobStatusChangeEvent{ID: "j", Status: JobStatusNull}.AppendJSON(nil)), `{"status": "null", "id": "j"}`},
	} {
		if c.got != c.want {
			t.Errorf("%s\n got  %s\n want %s", c.name, c.got, c.want)
		}
	}
}
