package blkdebug

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// configMax is the longest file with rules, in bytes: who names /dev/zero gets an error, and does
// not take all memory.
const configMax = 1 << 20

// readFile is the text of a file with rules.
func readFile(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close() // nothing was written
	text, err := io.ReadAll(io.LimitReader(f, configMax+1))
	if err == nil && len(text) > configMax {
		err = syscall.EFBIG
	}
	return string(text), err
}

// readConfig reads a file with rules: groups of KEY = "VALUE", each under [inject-error] or
// [set-state]. Errors have QEMU's words.
func readConfig(name string) (
	inject []*types.BlkdebugInjectErrorOptions, set []*types.BlkdebugSetStateOptions, err error,
) {
	text, err := readFile(name)
	if err != nil {
		return nil, nil, fmt.Errorf("Could not read blkdebug config file: %s", blk.ErrnoText(err))
	}
	groups, err := parseConfig(text)
	if err != nil {
		return nil, nil, err
	}
	for _, g := range groups {
		event, ok := g.values["event"]
		if !ok {
			return nil, nil, errors.New("Missing event name for rule")
		}
		if !slices.Contains(types.BlkdebugEventValues, types.BlkdebugEvent(event)) {
			return nil, nil, fmt.Errorf("invalid parameter value: %s", event)
		}
		if g.name == "set-state" {
			o := &types.BlkdebugSetStateOptions{Event: types.BlkdebugEvent(event), State: g.number("state")}
			if n := g.number("new_state"); n != nil {
				o.NewState = *n
			}
			set = append(set, o)
			continue
		}
		o := &types.BlkdebugInjectErrorOptions{
			Event: types.BlkdebugEvent(event), State: g.number("state"), Errno: g.number("errno"), Sector: g.number("sector"),
			Once: g.boolean("once"), Immediately: g.boolean("immediately"),
		}
		if t, ok := g.values["iotype"]; ok {
			if !slices.Contains(types.BlkdebugIOTypeValues, types.BlkdebugIOType(t)) {
				return nil, nil, fmt.Errorf("invalid parameter value: %s", t)
			}
			o.Iotype = (*types.BlkdebugIOType)(&t)
		}
		inject = append(inject, o)
	}
	return inject, set, nil
}

// group is a part of the file. Its values were checked.
type group struct {
	name   string
	values map[string]string
}

// members are those of each kind of group: s for words, n for numbers, b for on and off. The id
// of a group, which may also stand behind its name, says nothing.
var members = map[string]map[string]byte{
	"inject-error": {
		"event": 's', "state": 'n', "iotype": 's', "errno": 'n', "sector": 'n', "once": 'b', "immediately": 'b',
		"id": 's',
	},
	"set-state": {"event": 's', "state": 'n', "new_state": 'n', "id": 's'},
}

// booleans are the words for on and off.
var booleans = map[string]bool{
	"on": true, "yes": true, "true": true, "y": true, "off": false, "no": false, "false": false, "n": false,
}

func parseConfig(text string) (groups []*group, err error) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#':
		case line[0] == '[' && strings.Contains(line, "]"):
			inside, _, _ := strings.Cut(line[1:], "]") // what follows counts for nothing, as behind values
			name, _, _ := strings.Cut(strings.TrimSpace(inside), " ")
			if members[name] == nil {
				return nil, fmt.Errorf("There is no option group '%s'", name)
			}
			groups = append(groups, &group{name, map[string]string{}})
		case len(groups) == 0:
			return nil, errors.New("no group defined")
		default:
			if err := groups[len(groups)-1].set(line); err != nil {
				return nil, err
			}
		}
	}
	return groups, nil
}

// set takes over a line KEY = "VALUE".
func (g *group) set(line string) error {
	key, quoted, ok := strings.Cut(line, "=")
	key = strings.TrimSpace(key)
	quoted, isQuoted := strings.CutPrefix(strings.TrimSpace(quoted), `"`)
	v, _, ends := strings.Cut(quoted, `"`)
	if !ok || !isQuoted || !ends {
		return errors.New("parse error")
	}
	switch members[g.name][key] {
	case 0:
		return fmt.Errorf("Invalid parameter '%s'", key)
	case 'n':
		if _, err := strconv.ParseInt(v, 0, 64); err != nil {
			return fmt.Errorf("Parameter '%s' expects a number", key)
		}
	case 'b':
		if _, ok := booleans[v]; !ok {
			return fmt.Errorf("Parameter '%s' expects 'on' or 'off'", key)
		}
	}
	g.values[key] = v
	return nil
}

// number is a value, nil if it was not given.
func (g *group) number(key string) *int64 {
	v, ok := g.values[key]
	if !ok {
		return nil
	}
	n, err := strconv.ParseInt(v, 0, 64)
	if err != nil {
		panic("blkdebug: " + err.Error())
	}
	return &n
}

// boolean is a value, nil if it was not given.
func (g *group) boolean(key string) *bool {
	v, ok := g.values[key]
	if !ok {
		return nil
	}
	on := booleans[v]
	return &on
}
