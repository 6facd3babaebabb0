package file_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"qblockd/blockdev/drivertest"
	"qblockd/blockdev/protocol/file"
	"qblockd/graph"
	"qblockd/schema/types"
)

// TestSuite runs the conformance suite of drivers in memory and on disk, buffered and with
// O_DIRECT, through every way into the kernel.
func TestSuite(t *testing.T) {
	dirs := map[string]string{"disk": t.TempDir()}
	if shm, err := os.MkdirTemp("/dev/shm", "qblockd-test-"); err == nil {
		t.Cleanup(func() { os.RemoveAll(shm) })
		dirs["memory"] = shm
	}
	for kind, dir := range dirs {
		for _, w := range []struct {
			name   string
			direct bool
			aio    types.BlockdevAioOptions
		}{
			{"threads", false, types.BlockdevAioOptionsThreads},
			{"threads-direct", true, types.BlockdevAioOptionsThreads},
			{"uring", false, types.BlockdevAioOptionsIoUring},
			{"native-direct", true, types.BlockdevAioOptionsNative},
		} {
			t.Run(kind+"/"+w.name, func(t *testing.T) {
				if kind == "memory" && w.aio != types.BlockdevAioOptionsThreads {
					t.Skip("the same as threads")
				}
				open := func(t *testing.T, g *graph.Graph, size int64, readOnly bool) *graph.Node {
					t.Helper()
					path := filepath.Join(dir, "image")
					o := &types.BlockdevCreateOptionsFile{Filename: path, Size: uint64(size)}
					if err := file.Create(context.Background(), o, nil); err != nil {
						t.Fatal(err)
					}
					n, err := drivertest.Build(g, drivertest.Spec{
						Options: graph.Options{
							Name: "f", DriverName: "file", Kind: graph.Protocol, ReadOnly: readOnly, Direct: w.direct,
						},
						Open: file.Def.With(&types.BlockdevOptionsFile{Filename: path, Aio: &w.aio}),
					})
					if err != nil {
						t.Skipf("SKIPPED: not to be had here: %v", err)
					}
					return n
				}
				drivertest.Run(t, drivertest.Config{Steps: 150, Open: open})
			})
		}
	}
}

// TestSuiteHostDevice is the same on a loop device, where one can be had.
func TestSuiteHostDevice(t *testing.T) {
	for _, direct := range []bool{false, true} {
		name := "buffered"
		if direct {
			name = "direct"
		}
		t.Run(name, func(t *testing.T) {
			open := func(t *testing.T, g *graph.Graph, size int64, readOnly bool) *graph.Node {
				t.Helper()
				path := filepath.Join(t.TempDir(), "image")
				o := &types.BlockdevCreateOptionsFile{Filename: path, Size: uint64(size)}
				if err := file.Create(context.Background(), o, nil); err != nil {
					t.Fatal(err)
				}
				return drivertest.MustBuild(t, g, drivertest.Spec{
					Options: graph.Options{
						Name: "d", DriverName: "host_device", Kind: graph.Protocol, ReadOnly: readOnly, Direct: direct,
					},
					Open: file.HostDevice.With(&types.BlockdevOptionsFile{Filename: file.MustLoop(t, path)}),
				})
			}
			drivertest.Run(t, drivertest.Config{Steps: 80, Fixed: true, Open: open})
		})
	}
}
