package cmdline

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// OptType is the type of an option of the older syntax.
type OptType uint8

const (
	OptString OptType = iota
	OptBool
	OptNumber // unsigned 64 bit, C's number prefixes
	OptSize   // bytes, with a unit suffix
)

// Opts is what an argument in the older option syntax (QemuOpts) says. Of a name given several
// times, the last counts.
type Opts struct {
	ID string
	// Warnings are to be shown before any error; each may have a second line.
	Warnings []string
	// Help: "help" or "?" was among the flags.
	Help bool

	values  map[string]string
	numbers map[string]uint64 // of numbers and sizes
}

// Get returns the text given for name.
func (o *Opts) Get(name string) (string, bool) {
	v, ok := o.values[name]
	return v, ok
}

// Bool returns a boolean option, or def if it was not given.
func (o *Opts) Bool(name string, def bool) bool {
	if v, ok := o.values[name]; ok {
		b, _ := types.ParseBool(v)
		return b
	}
	return def
}

// Number returns a number or size option in its unit, or 0 if it was not given.
func (o *Opts) Number(name string) uint64 { return o.numbers[name] }

// ParseOpts parses name=value,... in the older option syntax: implied names the first value, a flag
// without value is a boolean (with a warning) and "no" before it negates it, ",," is a comma within
// a value. known lists the allowed names. id must be an identifier where given.
func ParseOpts(params, implied string, known map[string]OptType) (*Opts, error) {
	o := &Opts{values: map[string]string{}, numbers: map[string]uint64{}}
	if err := o.takeID(params); err != nil {
		return o, err
	}
	first := implied
	for rest := params; rest != ""; first = "" {
		var p optPair
		p, rest = nextOpt(rest, first)
		if p.flag {
			if p.name == "help" || p.name == "?" {
				o.Help = true
				return o, nil
			}
			o.Warnings = append(o.Warnings, p.warning())
		}
		if p.name == "id" {
			continue
		}
		typ, ok := known[p.name]
		if !ok {
			return o, fmt.Errorf("Invalid parameter '%s'", p.name)
		}
		if err := o.set(p.name, p.value, typ); err != nil {
			return o, err
		}
	}
	return o, nil
}

// takeID finds the id before anything else is looked at; here no name is implied.
func (o *Opts) takeID(params string) error {
	for rest := params; rest != ""; {
		var p optPair
		p, rest = nextOpt(rest, "")
		if p.name != "id" {
			continue
		}
		if !types.WellFormedID(p.value) {
			return blk.WithHint(errors.New("Parameter 'id' expects an identifier"),
				"Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.")
		}
		o.ID = p.value
		return nil
	}
	return nil
}

type optPair struct {
	name, value string
	flag        bool // given without a value
	negated     bool // by "no"
}

func (p optPair) warning() string {
	prefix := ""
	if p.negated {
		prefix = "no"
	}
	name, val := p.name, p.value
	if name == "delay" {
		name, val = "nodelay", "off"
		if p.negated {
			val = "on"
		}
	}
	return fmt.Sprintf("short-form boolean option '%s%s' deprecated\nPlease use %s=%s instead", prefix, p.name, name, val)
}

func nextOpt(params, implied string) (optPair, string) {
	n := strings.IndexAny(params, "=,")
	if n >= 0 && params[n] == '=' {
		v, rest := keyvalText(params[n+1:])
		return optPair{name: params[:n], value: v}, rest
	}
	if implied != "" {
		v, rest := keyvalText(params)
		return optPair{name: implied, value: v}, rest
	}
	rest := ""
	p := optPair{name: params, value: "on", flag: true}
	if n >= 0 {
		p.name, rest = params[:n], params[n+1:]
	}
	if strings.HasPrefix(p.name, "no") {
		p.name, p.value, p.negated = p.name[2:], "off", true
	}
	return p, rest
}

// set checks and keeps the value of an option.
func (o *Opts) set(name, val string, typ OptType) error {
	switch typ {
	case OptBool:
		if _, ok := types.ParseBool(val); !ok {
			return fmt.Errorf("Parameter '%s' expects 'on' or 'off'", name)
		}
	case OptNumber:
		n, err := strconv.ParseUint(val, 0, 64)
		if err != nil {
			return fmt.Errorf("Parameter '%s' expects a number", name)
		}
		o.numbers[name] = n
	case OptSize:
		n, ok := types.ParseSize(val)
		if !ok {
			return blk.WithHint(fmt.Errorf("Parameter '%s' expects a non-negative number below 2^64", name),
				"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\nand exabytes, respectively.")
		}
		o.numbers[name] = n
	}
	o.values[name] = val
	return nil
}
