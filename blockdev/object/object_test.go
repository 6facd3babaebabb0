package object

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"qblockd/schema/types"
)

func add(r *Registry, id string, limit int64) error {
	return r.Add(&types.ObjectOptions{QomType: types.ObjectTypeIothread, ID: id,
		U: &types.IothreadProperties{ThreadPoolMax: &limit}})
}

func TestRegistry(t *testing.T) {
	r := NewRegistry(func() []Chardev { return []Chardev{{"m", "stdio"}} })
	if err := add(r, "a", 3); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		err  error
		want string
	}{
		{add(r, "a", 1), "attempt to add duplicate property 'a' to object (type 'container')"},
		{add(r, "1", 1), "Parameter 'id' expects an identifier"},
		{add(r, "b", 0), "bad thread-pool-min/thread-pool-max values"},
		{add(r, "b", -1), "thread-pool-max value must be in range [0, 9223372036854775807]"},
		{r.Set("a", "thread-pool-min", int64(4)), "bad thread-pool-min/thread-pool-max values"},
		{r.Set("a", "thread-pool-max", int64(1)<<31), "bad thread-pool-min/thread-pool-max values"},
		{r.Set("a", "poll-max-ns", int64(-1)), "poll-max-ns value must be in range [0, 9223372036854775807]"},
		{r.Set("a", "aio-max-batch", "x"), "Invalid parameter type for 'aio-max-batch', expected: integer"},
		{r.Del("b"), "object 'b' not found"},
		{r.Set("/objects/a", "type", "x"), "Property 'iothread.type' is not writable"},
		{r.Set("/objects/a", "nope", "x"), "Property 'iothread.nope' not found"},
		{r.Set("/objects/b", "nope", "x"), "Device '/objects/b' not found"},
		{r.Set("a", "thread-pool-max", "x"), "Invalid parameter type for 'thread-pool-max', expected: integer"},
	} {
		if c.err == nil || c.err.Error() != c.want {
			t.Errorf("%v, want %s", c.err, c.want)
		}
	}
	if err := r.Set("a", "thread-pool-max", int64(5)); err != nil {
		t.Error(err)
	}
	if v, err := r.Get("/objects/a", "thread-pool-max"); err != nil || v != int64(5) {
		t.Errorf("get: %v %v", v, err)
	}
	for property, want := range map[string]int64{"poll-max-ns": 32768, "poll-grow": 0, "thread-pool-min": 0} {
		if v, err := r.Get("a", property); err != nil || v != want {
			t.Errorf("%s: %v %v, want %d", property, v, err, want)
		}
	}
	if v, err := r.Get("chardevs/m", "type"); err != nil || v != "chardev-stdio" {
		t.Errorf("get: %v %v", v, err)
	}
	if l, err := r.List("/"); err != nil || len(l) != 3 || l[1].Type != "child<container>" {
		t.Errorf("list: %v %v", l, err)
	}
	if l := r.Types("user-creatable", false); len(l) != 9 || l[0].Name != "authz-list" || l[8].Name != "tls-creds-x509" {
		t.Errorf("types: %v", l)
	}
	if l := r.Types("chardev", true); len(l) != 9 {
		t.Errorf("chardev types: %d", len(l))
	}
	if _, err := r.TypeProperties("nope"); err == nil || err.Error() != "Class 'nope' not found" {
		t.Error(err)
	}
	if err := r.Del("a"); err != nil || r.Iothread("a") != nil {
		t.Errorf("del: %v", err)
	}
}

// TestSecret: what users of secrets get, and that clients get nothing.
func TestSecret(t *testing.T) {
	r := NewRegistry(nil)
	ptr := func(s string) *string { return &s }
	b64 := types.QCryptoSecretFormatBase64
	for _, c := range []struct {
		id   string
		p    types.SecretProperties
		want string
	}{
		{"raw", types.SecretProperties{Data: ptr("open sesame")}, "open sesame"},
		{"encoded", types.SecretProperties{Data: ptr("aGVs\nbG8=\n"), Format: &b64}, "hello"},
		{"cut", types.SecretProperties{Data: ptr("aGVsbG8"), Format: &b64}, "hel"},
		{"key", types.SecretProperties{Data: ptr("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="), Format: &b64},
			"\x00\x01\x02\x03\x04\x05\x06\x07\x08\x09\x0a\x0b\x0c\x0d\x0e\x0f\x10\x11\x12\x13\x14\x15\x16\x17\x18\x19\x1a\x1b\x1c\x1d\x1e\x1f"},
		{"encrypted", types.SecretProperties{Data: ptr("f9Etr7fpWZ0LhJrYwuPCHw=="), Format: &b64, Keyid: ptr("key"),
			Iv: ptr("AAECAwQFBgcICQoLDA0ODw==")}, "hello"},
	} {
		if err := r.Add(&types.ObjectOptions{QomType: types.ObjectTypeSecret, ID: c.id, U: &c.p}); err != nil {
			t.Fatal(c.id, err)
		}
		got, err := r.secretData(c.id)
		if err != nil || string(got.Bytes()) != c.want {
			t.Errorf("%s: %q %v", c.id, got.Bytes(), err)
		}
		got.Close()
		if v, err := r.Get("/objects/"+c.id, "data"); err == nil || err.Error() != "Property 'secret.data' is not readable" {
			t.Errorf("%s: %v %v", c.id, v, err)
		}
		if err := r.Set("/objects/"+c.id, "data", "x"); err == nil || err.Error() != "Property 'secret.data' is not writable" {
			t.Error(c.id, err)
		}
	}
	p := types.SecretProperties{Data: ptr(""), Keyid: ptr("key"), Iv: ptr("AAECAwQFBgcICQoLDA0ODw==")}
	if err := r.Add(&types.ObjectOptions{QomType: types.ObjectTypeSecret, ID: "empty", U: &p}); err == nil || r.find("empty") != nil {
		t.Error("nothing was decrypted to something")
	}
}

func TestIothreadBounds(t *testing.T) {
	r := NewRegistry(nil)
	if err := add(r, "g", 3); err != nil {
		t.Fatal(err)
	}
	g := r.Iothread("g")
	var now, most atomic.Int64
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			if err := g.Enter(context.Background()); err != nil {
				t.Error(err)
				return
			}
			defer g.Leave()
			n := now.Add(1)
			for {
				m := most.Load()
				if n <= m || most.CompareAndSwap(m, n) {
					break
				}
			}
			now.Add(-1)
		})
	}
	wg.Wait()
	if most.Load() > 3 {
		t.Errorf("%d at once", most.Load())
	}
}

// TestIothreadWaits: waiting ends with the context, in the order of coming, and when the bound is
// raised.
func TestIothreadWaits(t *testing.T) {
	r := NewRegistry(nil)
	if err := add(r, "g", 1); err != nil {
		t.Fatal(err)
	}
	g := r.Iothread("g")
	if err := g.Enter(context.Background()); err != nil {
		t.Fatal(err)
	}
	gone, cancel := context.WithCancel(context.Background())
	waiters := func() int {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.waiting.Len()
	}
	busy := func() int64 {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.busy
	}
	first, second := make(chan error, 1), make(chan error, 1)
	go func() { first <- g.Enter(gone) }()
	for waiters() != 1 {
		runtime.Gosched()
	}
	go func() { second <- g.Enter(context.Background()) }()
	for waiters() != 2 {
		runtime.Gosched()
	}
	cancel()
	if err := <-first; err != context.Canceled {
		t.Errorf("cancelled: %v", err)
	}
	if err := r.Set("/objects/g", "thread-pool-max", int64(2)); err != nil {
		t.Fatal(err)
	}
	if err := <-second; err != nil {
		t.Error(err)
	}
	g.Leave()
	g.Leave()
	if x, n := busy(), waiters(); x != 0 || n != 0 {
		t.Errorf("%d busy, %d waiting", x, n)
	}
	if n := testing.AllocsPerRun(100, func() { g.Enter(gone); g.Leave() }); n != 0 {
		t.Errorf("%v allocations without waiting", n)
	}
}
