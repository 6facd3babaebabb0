package main

import (
	"errors"
	"fmt"
	"strings"

	"qblockd/blockdev"
	"qblockd/cmd/qblockd/cmdline"
)

// policyKeys are the parts of the image policy: --image-policy, its help and docs/image-policy.md
// go by them.
var policyKeys = []struct {
	name string
	typ  cmdline.OptType
	def  string // as shown
	text string
}{
	{"roots", cmdline.OptString, "/", "folders, absolute and separated by colons, that a file must be in, directly or deeper, when all symbolic links are followed"},
	{"devices", cmdline.OptBool, "off", "whether block devices may be named"},
	{"sockets", cmdline.OptBool, "off", "whether NBD servers may be named, of this host and others"},
	{"references", cmdline.OptBool, "off", "whether nodes, throttle groups and secrets of the daemon may be named"},
	{"data-files", cmdline.OptString, "beside", "files that an image may name for its own data, which are written to: beside (those in the image's folder), on, off"},
	{"max-chain", cmdline.OptNumber, "1000", "how many images a chain of backing files may have that headers name; 0: they may name nothing"},
}

var dataFiles = map[string]blockdev.DataFiles{
	"beside": blockdev.DataBeside, "on": blockdev.DataAnywhere, "off": blockdev.DataNowhere,
}

// maxMaxChain is the longest chain that can be allowed: opening one takes stack.
const maxMaxChain = 10000

// setPolicy does an argument of --image-policy.
func setPolicy(p *blockdev.Policy, arg string) error {
	known := map[string]cmdline.OptType{}
	for _, k := range policyKeys {
		known[k.name] = k.typ
	}
	o, err := parseSettings(arg, known, policyText)
	if err != nil {
		return err
	}
	next := *p
	if _, given := o.Get("max-chain"); given {
		n := o.Number("max-chain")
		if n > maxMaxChain {
			return fmt.Errorf("Parameter 'max-chain' expects a value from 0 to %d", maxMaxChain)
		}
		if next.MaxChain = int(n); n == 0 {
			next.MaxChain = -1 // none; 0 means the default there
		}
	}
	if roots, given := o.Get("roots"); given {
		if err := next.SetRoots(strings.Split(roots, ":")...); err != nil {
			return fmt.Errorf("Parameter 'roots' expects folders: %w", err)
		}
	}
	if which, given := o.Get("data-files"); given {
		var ok bool
		if next.DataFiles, ok = dataFiles[which]; !ok {
			return errors.New("Parameter 'data-files' expects 'beside', 'on' or 'off'")
		}
	}
	next.Devices, next.References = o.Bool("devices", p.Devices), o.Bool("references", p.References)
	next.Sockets = o.Bool("sockets", p.Sockets)
	*p = next
	return nil
}

// policyText is what --image-policy help shows.
func policyText() string {
	var b strings.Builder
	for _, k := range policyKeys {
		fmt.Fprintf(&b, "  %-28s %s\n", k.name+"="+k.def, k.text)
	}
	return b.String()
}
