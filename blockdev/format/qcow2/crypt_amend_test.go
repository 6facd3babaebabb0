package qcow2

import (
	"context"
	"errors"
	"syscall"
	"testing"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/driver"
	"qblockd/blockdev/drivertest"
	"qblockd/graph"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// secretObject is an object secret.
type secretObject string

func (s secretObject) Secret() (*crypto.Key, bool, error) {
	k, err := crypto.CopyKey([]byte(s))
	return k, true, err
}

// secretObjects are those of tests, each called as its text.
type secretObjects struct{}

// Object implements driver.Objects.
func (secretObjects) Object(id string) any { return secretObject(id) }

// sealedNode opens an encrypted image in a graph.
func sealedNode(t testing.TB, g *graph.Graph, f graph.Driver, format string) *graph.Node {
	t.Helper()
	return drivertest.MustBuild(t, g, drivertest.Spec{
		Options:  graph.Options{Name: "q", Kind: graph.Format, DriverName: "qcow2"},
		Children: []drivertest.Child{drivertest.File(drivertest.AddNode(t, g, "file", f))},
		Open: func(x *driver.Opening) (graph.Driver, error) {
			x.Objects = secretObjects{}
			o := &types.BlockdevOptionsQcow2{CacheCleanInterval: ptr(int64(0))}
			if format != "" {
				o.Encrypt = key(format, "key")
			}
			return Def.Open(x, o)
		},
	})
}

// changeKeys makes a change to an open image.
func changeKeys(g *graph.Graph, n *graph.Node, o *types.QCryptoBlockAmendOptions) error {
	ctx := context.Background()
	a := &driver.Amendment{Graph: g, Node: n, Objects: secretObjects{}}
	x, err := Def.Amend(ctx, a, &types.BlockdevAmendOptionsQcow2{Encrypt: o})
	if err != nil {
		return err
	}
	defer x.End()
	return x.Do(ctx, func() {})
}

func luksChange(o types.QCryptoBlockAmendOptionsLUKS) *types.QCryptoBlockAmendOptions {
	return &types.QCryptoBlockAmendOptions{Format: types.QCryptoBlockFormatLuks, U: &o}
}

func addingKey(secret string) *types.QCryptoBlockAmendOptions {
	return luksChange(types.QCryptoBlockAmendOptionsLUKS{
		State: types.QCryptoBlockLUKSKeyslotStateActive, NewSecret: &secret, IterTime: ptr(int64(0)),
		Keyslot: ptr(int64(6)), // lies in two sectors of the header
	})
}

func erasingKey(secret string) *types.QCryptoBlockAmendOptions {
	return luksChange(types.QCryptoBlockAmendOptionsLUKS{
		State: types.QCryptoBlockLUKSKeyslotStateInactive, OldSecret: &secret,
	})
}

// opensWith tells whether an image opens with a password, and checks it.
func opensWith(t *testing.T, m *drivertest.MemFile, secret string) bool {
	t.Helper()
	s, err := openImage(req(), config{
		file: mem{m.Clone()}, readOnly: true, password: words,
		options: Options{CacheCleanInterval: ptr(int64(0)), Encrypt: key("luks", secret)},
	})
	if err != nil {
		if err.Error() != "Invalid password, cannot unlock any keyslot" {
			t.Error(err)
		}
		return false
	}
	sound(t, s, true)
	s.Close()
	return true
}

// What cannot be changed is refused in the reference's words.
func TestAmendRefused(t *testing.T) {
	qcow := &types.QCryptoBlockAmendOptions{Format: types.QCryptoBlockFormatQcow}
	for _, c := range []struct {
		crypt string
		o     *types.QCryptoBlockAmendOptions
		want  string
	}{
		{"", addingKey("new"), "image is not encrypted, can't amend"},
		{"", qcow, "image is not encrypted, can't amend"},
		{"aes", qcow, "Amend can't be used to change the qcow2 encryption format"},
		{"aes", addingKey("new"), "Only LUKS encryption options can be amended for qcow2 with blockdev-amend"},
		{"luks", qcow, "Amend can't be used to change the qcow2 encryption format"},
		{"luks", erasingKey("other"), "No keyslots match given (old) password for erase operation"},
	} {
		g := drivertest.NewGraph(t)
		n := sealedNode(t, g, mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: c.crypt}), c.crypt)
		if err := changeKeys(g, n, c.o); err == nil || err.Error() != c.want {
			t.Errorf("%q: %v, want %s", c.crypt, err, c.want)
		}
	}
}

// Whenever the power fails or the daemon is killed, the image is sound and opens with the key that
// was not to be changed; with what was changed it does as it was told once that was acknowledged.
func TestAmendCrashes(t *testing.T) {
	c := drivertest.CrashFileOf(mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: "luks", ClusterSize: ptr(uint64(4096))}))
	g := drivertest.NewGraph(t)
	n := sealedNode(t, g, c, "luks")
	root, q := newRoot(t, g, n)
	var after []*drivertest.MemFile
	c.After(func(i int) {
		for seed := range uint64(2) {
			after = append(after, c.CrashLocked(uint64(i)*2+seed))
		}
	})
	step := func(what string, err error, old, added bool) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		for i, m := range after {
			if !opensWith(t, m, "key") {
				t.Errorf("%s, state %d: the other key is lost", what, i)
			}
		}
		if d := c.Durable(); opensWith(t, d, "key") != old || opensWith(t, d, "new") != added {
			t.Errorf("%s: is done, and not on disk", what)
		}
		after = nil
	}
	step("write", root.WriteAt(q, blk.Buf(make([]byte, 64<<10)), 0, 0), true, false)
	step("add", changeKeys(g, n, addingKey("new")), true, true)
	step("flush", root.Flush(q), true, true)
	step("erase", changeKeys(g, n, erasingKey("new")), true, false)
	c.After(nil)
}

// Whatever I/O fails, the image opens with the key that was not to be changed, and what queries
// show of the other is not less than what is on disk.
func TestAmendFailures(t *testing.T) {
	for what, o := range map[string]*types.QCryptoBlockAmendOptions{"add": addingKey("new"), "erase": erasingKey("new")} {
		for i := 0; ; i++ {
			m := mustCreate(t, CreateOptions{Size: 1 << 20, Crypt: "luks"})
			f := drivertest.NewFault(m)
			g := drivertest.NewGraph(t)
			n := sealedNode(t, g, f, "luks")
			if what == "erase" {
				if err := changeKeys(g, n, addingKey("new")); err != nil {
					t.Fatal(err)
				}
			}
			f.FailAt(i, syscall.EIO)
			err := changeKeys(g, n, o)
			if err != nil && !errors.Is(err, syscall.EIO) {
				t.Errorf("%s, call %d fails: %v", what, i, err)
			}
			if !opensWith(t, m, "key") {
				t.Errorf("%s, call %d fails: the other key is lost", what, i)
			}
			var info types.ImageInfo
			n.Driver().(graph.Informer).ImageInfo(&info)
			data := info.FormatSpecific.U.(*types.ImageInfoSpecificQCow2Wrapper).Data
			if opensWith(t, m, "new") && !data.Encrypt.U.(*types.QCryptoBlockInfoLUKS).Slots[6].Active {
				t.Errorf("%s, call %d fails: an active slot is shown as inactive", what, i)
			}
			if f.Failed() == 0 {
				break
			}
		}
	}
}

// TestSuiteEncrypted runs the conformance suite over encrypted images.
func TestSuiteEncrypted(t *testing.T) {
	for _, crypt := range []string{"luks", "aes"} {
		t.Run(crypt, func(t *testing.T) {
			drivertest.Run(t, drivertest.Config{
				Steps: 100,
				Open: func(t *testing.T, g *graph.Graph, size int64, ro bool) *graph.Node {
					m := mustCreate(t, CreateOptions{Size: uint64(size), Crypt: crypt, ClusterSize: ptr(uint64(4096))})
					return drivertest.MustBuild(t, g, drivertest.Spec{
						Options:  graph.Options{Name: "q", Kind: graph.Format, DriverName: "qcow2", ReadOnly: ro},
						Children: []drivertest.Child{drivertest.File(drivertest.AddNode(t, g, "file", m))},
						Open: func(x *driver.Opening) (graph.Driver, error) {
							x.Objects = secretObjects{}
							return Def.Open(x, &types.BlockdevOptionsQcow2{Encrypt: key(crypt, "key")})
						},
					})
				},
				Check: func(t *testing.T, n *graph.Node) { sound(t, n.Driver().(*Driver).image, true) },
			})
		})
	}
}
