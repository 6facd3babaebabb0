package object

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"qblockd/blockdev/tlscreds"
	"qblockd/graph/blk"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

var (
	_ tlscreds.Authorizer = (*authzSimple)(nil)
	_ tlscreds.Authorizer = (*authzList)(nil)
	_ tlscreds.Authorizer = (*authzFile)(nil)
)

// authzSimple allows one name.
type authzSimple struct {
	mu       sync.Mutex
	identity string // +checklocks:mu
}

func (a *authzSimple) typ() string { return "authz-simple" }

// Allows implements tlscreds.Authorizer.
func (a *authzSimple) Allows(name string) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return name == a.identity, nil
}

func (a *authzSimple) get(string) (value.Value, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.identity, nil
}

func (a *authzSimple) set(property string, v value.Value) error {
	s, ok := v.(string)
	if !ok {
		return fmt.Errorf("Invalid parameter type for '%s', expected: string", property)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.identity = s
	return nil
}

func (a *authzSimple) retire() bool { return true }

// authzList allows by rules.
type authzList struct {
	mu sync.Mutex
	p  types.AuthZListProperties // +checklocks:mu
}

func (a *authzList) typ() string { return "authz-list" }

// Allows implements tlscreds.Authorizer.
func (a *authzList) Allows(name string) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return allows(&a.p, name), nil
}

// allows tells whether rules allow a name: the first that matches decides.
func allows(p *types.AuthZListProperties, name string) bool {
	policy := types.Or(p.Policy, types.QAuthZListPolicyDeny)
	for _, r := range p.Rules {
		hit := r.Match == name
		if types.Or(r.Format, types.QAuthZListFormatExact) == types.QAuthZListFormatGlob {
			hit = globMatches([]rune(r.Match), []rune(name))
		}
		if hit {
			policy = r.Policy
			break
		}
	}
	return policy == types.QAuthZListPolicyAllow
}

// globMatches tells whether s is what pattern stands for: * is any text, ? any character. It takes
// time in proportion to the product of both lengths at most.
func globMatches(pattern, s []rune) bool {
	p, i := 0, 0
	star, after := -1, 0 // the last *, and where what comes after it was tried
	for i < len(s) {
		switch {
		case p < len(pattern) && pattern[p] == '*':
			star, after = p, i
			p++
		case p < len(pattern) && (pattern[p] == '?' || pattern[p] == s[i]):
			p++
			i++
		case star >= 0:
			after++
			p, i = star+1, after
		default:
			return false
		}
	}
	for p < len(pattern) && pattern[p] == '*' {
		p++
	}
	return p == len(pattern)
}

func (a *authzList) get(property string) (value.Value, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if property == "policy" {
		return string(types.Or(a.p.Policy, types.QAuthZListPolicyDeny)), nil
	}
	rules := make(value.List, 0, len(a.p.Rules))
	for _, r := range a.p.Rules {
		d := &value.Dict{}
		if r.Format != nil {
			d.Set("format", string(*r.Format))
		}
		d.Set("policy", string(r.Policy))
		d.Set("match", r.Match)
		rules = append(rules, d)
	}
	return rules, nil
}

// set changes the rules for those who connect from now on.
func (a *authzList) set(property string, v value.Value) error {
	d := &value.Dict{}
	d.Set(property, v)
	p, err := types.DecodeAuthZListProperties(d, types.ModeQObject)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if property == "policy" {
		a.p.Policy = p.Policy
	} else {
		a.p.Rules = p.Rules
	}
	return nil
}

func (a *authzList) retire() bool { return true }

// authzFile allows by rules in a file.
type authzFile struct {
	p types.AuthZListFileProperties
	// as it was; nil: the file is read when somebody connects
	rules *types.AuthZListProperties
}

func (a *authzFile) typ() string { return "authz-list-file" }

func (a *authzFile) complete(*Registry) error {
	rules, err := a.load()
	if err == nil && !types.Or(a.p.Refresh, true) {
		a.rules = rules
	}
	return err
}

// maxRules is how long a file with rules may be, in bytes.
const maxRules = 1 << 20

func (a *authzFile) load() (*types.AuthZListProperties, error) {
	f, err := openRegular(a.p.Filename)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxRules+1))
	switch {
	case err != nil:
		return nil, blk.Errnof(err, "Unable to read '%s'", a.p.Filename)
	case len(data) > maxRules:
		return nil, fmt.Errorf("File '%s' is too long", a.p.Filename)
	}
	v, err := value.Parse(string(data))
	if err != nil {
		return nil, fmt.Errorf("File '%s': %w", a.p.Filename, err)
	}
	if _, ok := v.(*value.Dict); !ok {
		return nil, fmt.Errorf("File '%s' must contain a JSON object", a.p.Filename)
	}
	p, err := types.DecodeAuthZListProperties(v, types.ModeQObject)
	if err != nil {
		return nil, fmt.Errorf("File '%s': %w", a.p.Filename, err)
	}
	return p, nil
}

// openRegular opens a file that is one: another could make the reader wait.
func openRegular(name string) (*os.File, error) {
	st, err := os.Stat(name)
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("not a regular file")
		return nil, fmt.Errorf("Unable to read '%s': %w", name, err)
	}
	var f *os.File
	if err == nil {
		f, err = os.Open(name)
	}
	if err != nil {
		return nil, blk.Errnof(err, "Unable to read '%s'", name)
	}
	return f, nil
}

// Allows implements tlscreds.Authorizer. A file that cannot be read allows nobody.
func (a *authzFile) Allows(name string) (bool, error) {
	rules := a.rules
	if rules == nil {
		var err error
		if rules, err = a.load(); err != nil {
			return false, err
		}
	}
	return allows(rules, name), nil
}

func (a *authzFile) get(property string) (value.Value, error) {
	if property == "filename" {
		return a.p.Filename, nil
	}
	return types.Or(a.p.Refresh, true), nil
}

// set changes nothing: who may connect is not to lead elsewhere.
func (a *authzFile) set(string, value.Value) error { return errReadOnly }

func (a *authzFile) retire() bool { return true }
