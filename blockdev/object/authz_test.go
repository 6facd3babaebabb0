package object

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"qblockd/blockdev/tlscreds"
	"qblockd/blockdev/tlscreds/certs"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

func ptr[T any](v T) *T { return &v }

const (
	allow = types.QAuthZListPolicyAllow
	deny  = types.QAuthZListPolicyDeny
)

// mustAdd adds an object and returns who it allows.
func mustAdd(t *testing.T, r *Registry, id string, u any, typ types.ObjectType) tlscreds.Authorizer {
	t.Helper()
	if err := r.Add(&types.ObjectOptions{QomType: typ, ID: id, U: u}); err != nil {
		t.Fatal(id, err)
	}
	a, _ := r.Object(id).(tlscreds.Authorizer)
	return a
}

func rule(match string, p types.QAuthZListPolicy, glob bool) *types.QAuthZListRule {
	r := &types.QAuthZListRule{Match: match, Policy: p}
	if glob {
		r.Format = ptr(types.QAuthZListFormatGlob)
	}
	return r
}

// TestAuthzList: the first rule that matches decides.
func TestAuthzList(t *testing.T) {
	r := NewRegistry(nil)
	for name, c := range map[string]struct {
		p       types.AuthZListProperties
		yes, no []string
	}{
		"empty": {types.AuthZListProperties{}, nil, []string{"", "a"}},
		"open":  {types.AuthZListProperties{Policy: ptr(allow)}, []string{"", "a"}, nil},
		"exact": {types.AuthZListProperties{Rules: []*types.QAuthZListRule{rule("a*", allow, false)}}, []string{"a*"}, []string{"a", "ab"}},
		"except": {types.AuthZListProperties{Policy: ptr(allow), Rules: []*types.QAuthZListRule{rule("CN=x", deny, false)}},
			[]string{"CN=y"}, []string{"CN=x"}},
		"order": {types.AuthZListProperties{
			Rules: []*types.QAuthZListRule{rule("*,CN=guest", deny, true), rule("C=GB,*", allow, true)}},
			[]string{"C=GB,CN=a", "C=GB,"}, []string{"C=GB,CN=guest", "C=FR,CN=a", "C=GB"}},
		"marks": {types.AuthZListProperties{Rules: []*types.QAuthZListRule{rule("a?c*e", allow, true)}},
			[]string{"abce", "aéc/e", "abcdeXe"}, []string{"ace", "abcd", "abc", ""}},
	} {
		a := mustAdd(t, r, name, &c.p, types.ObjectTypeAuthzList)
		for want, names := range map[bool][]string{true: c.yes, false: c.no} {
			for _, n := range names {
				if got, err := a.Allows(n); got != want || err != nil {
					t.Errorf("%s, %q: %v %v", name, n, got, err)
				}
			}
		}
	}
}

// TestGlobTime: no pattern takes time beyond reason.
func TestGlobTime(t *testing.T) {
	if globMatches([]rune(strings.Repeat("a*", 2000)+"b"), []rune(strings.Repeat("a", 4000))) {
		t.Error("matches")
	}
}

// TestAuthzSet: rules can be changed while they are in use.
func TestAuthzSet(t *testing.T) {
	r := NewRegistry(nil)
	a := mustAdd(t, r, "l", &types.AuthZListProperties{}, types.ObjectTypeAuthzList)
	s := mustAdd(t, r, "s", &types.AuthZSimpleProperties{Identity: "joe"}, types.ObjectTypeAuthzSimple)
	v, err := value.Parse(`[{"match": "x*", "policy": "allow", "format": "glob"}]`)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []error{r.Set("l", "rules", v), r.Set("l", "policy", "deny"), r.Set("s", "identity", "ann")} {
		if e != nil {
			t.Error(e)
		}
	}
	for who, want := range map[string]bool{"xy": true, "joe": false, "ann": false} {
		if got, _ := a.Allows(who); got != want {
			t.Error(who, got)
		}
	}
	if got, _ := s.Allows("ann"); !got {
		t.Error("ann is not let in")
	}
	if got, err := r.Get("l", "rules"); err != nil || string(value.Append(nil, got)) != `[{"format": "glob", "policy": "allow", "match": "x*"}]` {
		t.Error(string(value.Append(nil, got)), err)
	}
	for _, c := range []struct {
		err  error
		want string
	}{
		{r.Set("l", "policy", "maybe"), "Parameter 'policy' does not accept value 'maybe'"},
		{r.Set("l", "rules", value.List{&value.Dict{}}), "Parameter 'rules[0].match' is missing"},
		{r.Set("s", "identity", int64(1)), "Invalid parameter type for 'identity', expected: string"},
	} {
		if c.err == nil || c.err.Error() != c.want {
			t.Errorf("%v, want %s", c.err, c.want)
		}
	}
}

// TestAuthzFile: the file counts as it is, and lets nobody in while it cannot be read.
func TestAuthzFile(t *testing.T) {
	r := NewRegistry(nil)
	path := filepath.Join(t.TempDir(), "rules")
	add := func(id string, refresh *bool) error {
		return r.Add(&types.ObjectOptions{QomType: types.ObjectTypeAuthzListfile, ID: id,
			U: &types.AuthZListFileProperties{Filename: path, Refresh: refresh}})
	}
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fails := func(want string) {
		t.Helper()
		if err := add("x", nil); err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	}
	fails("Unable to read '" + path + "': No such file or directory")
	write("[]")
	fails("File '" + path + "' must contain a JSON object")
	write(`{"policy": "maybe"}`)
	fails("File '" + path + "': Parameter 'policy' does not accept value 'maybe'")
	write(strings.Repeat(" ", maxRules+1))
	fails("File '" + path + "' is too long")
	write(`{"policy": "deny", "rules": [{"match": "joe", "policy": "allow"}]}`)
	for id, refresh := range map[string]*bool{"live": nil, "fixed": ptr(false)} {
		if err := add(id, refresh); err != nil {
			t.Fatal(err)
		}
	}
	is := func(id, who string, want bool) {
		t.Helper()
		if got, _ := r.Object(id).(tlscreds.Authorizer).Allows(who); got != want {
			t.Errorf("%s, %s: %v", id, who, got)
		}
	}
	is("live", "joe", true)
	write(`{"rules": [{"match": "ann", "policy": "allow"}]}`)
	is("live", "joe", false)
	is("live", "ann", true)
	is("fixed", "joe", true)
	is("fixed", "ann", false)
	write(`{"rules": [`)
	is("live", "ann", false)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	is("live", "ann", false)
	if got, err := r.Get("/objects/live", "type"); got != "authz-list-file" || err != nil {
		t.Error(got, err)
	}
}

// TestCertificates: what is shown of credentials, and the secret they need.
func TestCertificates(t *testing.T) {
	r := NewRegistry(nil)
	ca := certs.CA(t)
	dir := certs.Dir(t, ca, ca.Server(t), nil)
	p := &types.TlsCredsX509Properties{Dir: &dir, Endpoint: ptr(types.QCryptoTLSCredsEndpointServer), Passwordid: ptr("p")}
	o := &types.ObjectOptions{QomType: types.ObjectTypeTlsCredsX509, ID: "t", U: p}
	if err := r.Add(o); err == nil || err.Error() != "No secret with id 'p'" || r.Object("t") != nil {
		t.Error(err)
	}
	mustAdd(t, r, "p", &types.SecretProperties{Data: ptr("123456")}, types.ObjectTypeSecret)
	if err := r.Add(o); err != nil {
		t.Fatal(err)
	}
	for property, want := range map[string]value.Value{"endpoint": "server", "dir": dir, "verify-peer": true, "priority": "",
		"sanity-check": true, "passwordid": "p", "loaded": true} {
		if got, err := r.Get("t", property); got != want || err != nil {
			t.Errorf("%s: %v %v", property, got, err)
		}
		if err := r.Set("t", property, want); err == nil || err.Error() != "Property 'tls-creds-x509."+property+"' is not writable" {
			t.Errorf("%s: %v", property, err)
		}
	}
	if _, ok := r.Object("t").(tlscreds.Creds); !ok {
		t.Error("they are no credentials")
	}
	if err := r.Del("t"); err != nil {
		t.Error(err)
	}
}
