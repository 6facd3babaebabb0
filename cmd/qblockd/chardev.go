package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"qblockd/cmd/qblockd/cmdline"
	"qblockd/qmp/chardev"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// chardevOptions are the names that --chardev knows.
var chardevOptions = map[string]cmdline.OptType{
	"backend": cmdline.OptString, "path": cmdline.OptString, "input-path": cmdline.OptString,
	"host": cmdline.OptString, "port": cmdline.OptString, "fd": cmdline.OptString,
	"to": cmdline.OptNumber, "ipv4": cmdline.OptBool, "ipv6": cmdline.OptBool,
	"server": cmdline.OptBool, "wait": cmdline.OptBool, "delay": cmdline.OptBool, "nodelay": cmdline.OptBool,
	"reconnect": cmdline.OptNumber, "reconnect-ms": cmdline.OptNumber, "telnet": cmdline.OptBool, "tls-creds": cmdline.OptString, "tls-authz": cmdline.OptString,
	"tight": cmdline.OptBool, "abstract": cmdline.OptBool,
	"logfile": cmdline.OptString, "logappend": cmdline.OptBool,
	"localaddr": cmdline.OptString, "localport": cmdline.OptString, "chardev": cmdline.OptString,
	"signal": cmdline.OptBool, "append": cmdline.OptBool, "size": cmdline.OptSize,
}

// addChardev does --chardev.
func (d *daemon) addChardev(ctx context.Context, it cmdline.Item) error {
	o, err := cmdline.ParseOpts(it.Arg, "backend", chardevOptions)
	for _, w := range o.Warnings {
		report(it.Where(), "warning: "+w)
	}
	if err != nil {
		return err
	}
	kind, given := o.Get("backend")
	if o.Help || kind == "help" || kind == "?" {
		fmt.Println("Available chardev backend types: ")
		for _, b := range d.chardevs.Backends() {
			fmt.Println("  " + b.Name)
		}
		return errHelpShown
	}
	switch {
	case o.ID == "":
		return errors.New("chardev: no id specified")
	case !given:
		return fmt.Errorf("chardev: %q missing backend", o.ID)
	case !slices.Contains(types.ChardevBackendKindValues, types.ChardevBackendKind(kind)):
		return fmt.Errorf("'%s' is not a valid char driver name", kind)
	}
	b, err := chardevBackend(types.ChardevBackendKind(kind), o)
	if err != nil {
		return err
	}
	made, err := d.chardevs.Open(ctx, o.ID, b, chardev.CommandLine)
	if err == nil && made.Pty != nil {
		fmt.Printf("char device redirected to %s (label %s)\n", *made.Pty, o.ID)
	}
	return err
}

// chardevBackend translates the older option syntax into the schema's description.
func chardevBackend(kind types.ChardevBackendKind, o *cmdline.Opts) (*types.ChardevBackend, error) {
	data := &value.Dict{}
	take(o, data, "logfile", "logappend")
	var err error
	switch _, hasPath := o.Get("path"); kind {
	case types.ChardevBackendKindSocket:
		err = chardevSocket(o, data)
	case types.ChardevBackendKindUdp:
		err = chardevUDP(o, data)
	case types.ChardevBackendKindFile:
		if !hasPath {
			err = errors.New("chardev: file: no filename given")
		}
		take(o, data, "out=path", "in=input-path", "append")
	case types.ChardevBackendKindPipe, types.ChardevBackendKindSerial, types.ChardevBackendKindParallel:
		name := string(kind)
		if kind == types.ChardevBackendKindSerial {
			name = "serial/tty"
		}
		if !hasPath {
			err = fmt.Errorf("chardev: %s: no device path given", name)
		}
		take(o, data, "device=path")
	case types.ChardevBackendKindStdio:
		take(o, data, "signal")
	case types.ChardevBackendKindMux:
		if _, ok := o.Get("chardev"); !ok {
			err = errors.New("chardev: mux: no chardev given")
		}
		take(o, data, "chardev")
	case types.ChardevBackendKindRingbuf, types.ChardevBackendKindMemory:
		if n := int64(o.Number("size")); n != 0 { // 0 is as if it were not given
			data.Set("size", fmt.Sprint(n))
		}
	}
	if err != nil {
		return nil, err
	}
	b := &value.Dict{}
	b.Set("type", string(kind))
	b.Set("data", data)
	return types.DecodeChardevBackend(b, types.ModeKeyval)
}

// take sets members of data to what was given for options: "name", or "member=option" where the
// schema has another name.
func take(o *cmdline.Opts, data *value.Dict, names ...string) {
	for _, name := range names {
		member, option, renamed := strings.Cut(name, "=")
		if !renamed {
			option = member
		}
		if v, ok := o.Get(option); ok {
			data.Set(member, v)
		}
	}
}

// socketAddress is a SocketAddressLegacy of which that much is known.
func socketAddress(kind types.SocketAddressType, data *value.Dict) *value.Dict {
	a := &value.Dict{}
	a.Set("type", string(kind))
	a.Set("data", data)
	return a
}

// chardevSocket reads the options of a socket. Unlike in the schema, server is off and wait is on
// by default.
func chardevSocket(o *cmdline.Opts, data *value.Dict) error {
	_, unix := o.Get("path")
	fd, inherited := o.Get("fd")
	_, inet := o.Get("host")
	if unix && inherited || unix && inet || inherited && inet {
		return errors.New("None or one of 'path', 'fd' or 'host' option required.")
	}
	if _, hasPort := o.Get("port"); inet && !hasPort {
		return errors.New("chardev: socket: no port given")
	}
	_, delay := o.Get("delay")
	_, nodelay := o.Get("nodelay")
	if delay && nodelay {
		return errors.New("'delay' and 'nodelay' are mutually exclusive")
	}
	server := o.Bool("server", false)
	data.Set("server", onOff(server))
	take(o, data, "telnet", "wait", "nodelay", "tls-creds", "tls-authz")
	if _, given := o.Get("wait"); !given && server {
		data.Set("wait", "on")
	}
	if delay {
		data.Set("nodelay", onOff(!o.Bool("delay", true)))
	}
	for _, name := range []string{"reconnect", "reconnect-ms"} {
		if _, given := o.Get(name); given {
			data.Set(name, fmt.Sprint(int64(o.Number(name))))
		}
	}
	addr, kind := &value.Dict{}, types.SocketAddressTypeFd
	switch {
	case unix:
		kind = types.SocketAddressTypeUnix
		take(o, addr, "path", "abstract", "tight")
	case inet:
		kind = types.SocketAddressTypeInet
		take(o, addr, "host", "port", "ipv4", "ipv6")
		if _, given := o.Get("to"); given {
			addr.Set("to", fmt.Sprint(uint16(o.Number("to"))))
		}
	default:
		addr.Set("str", fd)
	}
	data.Set("addr", socketAddress(kind, addr))
	return nil
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// chardevUDP takes host, port, localaddr and localport; all but port have defaults.
func chardevUDP(o *cmdline.Opts, data *value.Dict) error {
	inet := func(member, host, port string) {
		a := &value.Dict{}
		a.Set("host", host)
		a.Set("port", port)
		take(o, a, "ipv4", "ipv6")
		data.Set(member, socketAddress(types.SocketAddressTypeInet, a))
	}
	host, _ := o.Get("host")
	port, _ := o.Get("port")
	if port == "" {
		return errors.New("chardev: udp: remote port not specified")
	}
	inet("remote", cmp.Or(host, "localhost"), port)
	localAddr, hasAddr := o.Get("localaddr")
	localPort, hasPort := o.Get("localport")
	if hasAddr || hasPort {
		inet("local", localAddr, cmp.Or(localPort, "0"))
	}
	return nil
}
