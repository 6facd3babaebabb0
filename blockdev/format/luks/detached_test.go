package luks

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// newDetached makes an image whose header lies in a file of its own.
func newDetached(t *testing.T, size int64) (header, data *drivertest.MemFile) {
	t.Helper()
	g := drivertest.NewGraph(t)
	header, data = drivertest.NewMemFile(0), drivertest.NewMemFile(0)
	roots := map[string]*graph.Root{}
	for name, f := range map[string]*drivertest.MemFile{"header": header, "data": data} {
		roots[name] = drivertest.AddRoot(t, g, drivertest.AddNode(t, g, name, f), anything)
	}
	ctx, o := context.Background(), options(size)
	o.File, o.Header = &types.BlockdevRef{Reference: ptr("data")}, &types.BlockdevRef{Reference: ptr("header")}
	c := &driver.Creation{Objects: known, Started: func() {},
		InFile: func(_ context.Context, f *types.BlockdevRef, use func(*graph.Root) error) error {
			return use(roots[*f.Reference])
		}}
	if err := Def.Create(ctx, c, o); err != nil {
		t.Fatal(err)
	}
	return header, data
}

func openDetached(t *testing.T, g *graph.Graph, header, data *drivertest.MemFile) *graph.Node {
	t.Helper()
	u := &types.BlockdevOptionsLUKS{KeySecret: ptr("one"), Header: &types.BlockdevRef{}}
	files := []*graph.Node{drivertest.AddNode(t, g, "data", data), drivertest.AddNode(t, g, "header", header)}
	var kids []drivertest.Child
	for i, c := range Def.Children(u) {
		kids = append(kids, drivertest.Child{Name: c.Name, Role: c.Role, Node: files[i]})
	}
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "disk", DriverName: "luks", Kind: graph.Format},
		Children: kids,
		Open: func(x *driver.Opening) (graph.Driver, error) {
			x.Objects = known
			return Def.Open(x, u)
		},
	})
}

// The data begin where their file begins; keys change in the other file alone.
func TestDetached(t *testing.T) {
	header, data := newDetached(t, 1<<20)
	if len(data.Bytes()) != 1<<20 {
		t.Errorf("the data take %d bytes", len(data.Bytes()))
	}
	g := drivertest.NewGraph(t)
	n := openDetached(t, g, header, data)
	var info types.ImageInfo
	n.Driver().(graph.Informer).ImageInfo(&info)
	d := info.FormatSpecific.U.(*types.ImageInfoSpecificLUKSWrapper).Data
	if d.DetachedHeader == nil || d.PayloadOffset != 0 {
		t.Errorf("%+v", d)
	}
	root := drivertest.AddRoot(t, g, n, drivertest.Writer)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{0x5a}, 4096)
	if err := root.WriteAt(r, blk.Buf(want), 0, 0); err != nil {
		t.Error(err)
	}
	root.End(r)
	drivertest.AddRoot(t, g, n.File().Node(), drivertest.Reader) // a reader of the data is in nobody's way
	before := bytes.Clone(data.Bytes())
	if err := changeKeys(g, n, false, adding("two")); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(before, data.Bytes()) {
		t.Error("a change of keys has changed the data")
	}
	qemuReadsDetached(t, header, data)
}

// qemuReadsDetached has QEMU 10.0 read and write what TestDetached has written, by the new key.
func qemuReadsDetached(t *testing.T, header, data *drivertest.MemFile) {
	path, err := exec.LookPath("qemu-io10")
	if err != nil {
		t.Skip("SKIPPED: no QEMU that knows detached headers")
	}
	dir := t.TempDir()
	for name, m := range map[string]*drivertest.MemFile{"h": header, "d": data} {
		if err := os.WriteFile(filepath.Join(dir, name), m.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command(path, "--object", "secret,id=k,data=two", "-c", "read -P 0x5a 0 4096",
		"-c", "write -P 7 4096 4096", "--image-opts", "driver=luks,key-secret=k,file.driver=file,"+
			"header.driver=file,file.filename="+dir+"/d,header.filename="+dir+"/h").CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("failed")) {
		t.Errorf("%v\n%s", err, out)
	}
	b, err := os.ReadFile(filepath.Join(dir, "d"))
	if err != nil {
		t.Fatal(err)
	}
	g := drivertest.NewGraph(t)
	root := drivertest.AddRoot(t, g, openDetached(t, g, header, drivertest.MemFileOf(b)), drivertest.Reader)
	r, err := root.Begin(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer root.End(r)
	got := make([]byte, 4096)
	if err := root.ReadAt(r, blk.Buf(got), 4096, 0); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, 4096)) {
		t.Errorf("QEMU's write reads as something else: %v", err)
	}
}

// An image has to be made somewhere; its header can be made alone.
func TestCreateWhere(t *testing.T) {
	c := &driver.Creation{Objects: known, Started: func() {}}
	err := Def.Create(context.Background(), c, options(1<<20))
	if err == nil || err.Error() != "Either the parameter 'header' or 'file' must be specified" {
		t.Error(err)
	}
	g := drivertest.NewGraph(t)
	m := drivertest.NewMemFile(0)
	root := drivertest.AddRoot(t, g, drivertest.AddNode(t, g, "header", m), anything)
	c.InFile = func(_ context.Context, _ *types.BlockdevRef, use func(*graph.Root) error) error { return use(root) }
	o := options(1 << 20)
	o.Header = &types.BlockdevRef{}
	if err := Def.Create(context.Background(), c, o); err != nil || len(m.Bytes()) != 4040*512 {
		t.Errorf("a header alone: %d bytes, %v", len(m.Bytes()), err)
	}
}
