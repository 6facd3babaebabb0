package main

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"qblockd/cmd/qblockd/cmdline"
	"qblockd/qmp/chardev"
	"qblockd/schema/types"
)

var errOnlyQMP = errors.New("Only QMP is supported")

// chardevOptions are the names that --chardev knows.
var chardevOptions = map[string]cmdline.OptType{
	"backend": cmdline.OptString, "path": cmdline.OptString, "input-path": cmdline.OptString,
	"host": cmdline.OptString, "port": cmdline.OptString, "fd": cmdline.OptString,
	"to": cmdline.OptNumber, "ipv4": cmdline.OptBool, "ipv6": cmdline.OptBool,
	"server": cmdline.OptBool, "wait": cmdline.OptBool, "delay": cmdline.OptBool, "nodelay": cmdline.OptBool,
	"reconnect": cmdline.OptNumber, "telnet": cmdline.OptBool, "tight": cmdline.OptBool, "abstract": cmdline.OptBool,
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
	log, appendLog := text(o, "logfile"), boolean(o, "logappend")
	b := &types.ChardevBackend{Type: kind}
	switch kind {
	case types.ChardevBackendKindSocket:
		s, err := chardevSocket(o)
		if err != nil {
			return nil, err
		}
		s.Logfile, s.Logappend = log, appendLog
		b.U = &types.ChardevSocketWrapper{Data: *s}
	case types.ChardevBackendKindFile:
		path, ok := o.Get("path")
		if !ok {
			return nil, errors.New("chardev: file: no filename given")
		}
		b.U = &types.ChardevFileWrapper{Data: types.ChardevFile{
			Out: path, In: text(o, "input-path"), Append: boolean(o, "append"), Logfile: log, Logappend: appendLog}}
	case types.ChardevBackendKindPipe, types.ChardevBackendKindSerial, types.ChardevBackendKindParallel:
		path, ok := o.Get("path")
		if !ok && kind == types.ChardevBackendKindSerial {
			return nil, errors.New("chardev: serial/tty: no device path given")
		}
		if !ok {
			return nil, fmt.Errorf("chardev: %s: no device path given", kind)
		}
		b.U = &types.ChardevHostdevWrapper{Data: types.ChardevHostdev{Device: path, Logfile: log, Logappend: appendLog}}
	case types.ChardevBackendKindStdio:
		b.U = &types.ChardevStdioWrapper{Data: types.ChardevStdio{
			Signal: boolean(o, "signal"), Logfile: log, Logappend: appendLog}}
	case types.ChardevBackendKindUdp:
		u, err := chardevUDP(o)
		if err != nil {
			return nil, err
		}
		u.Logfile, u.Logappend = log, appendLog
		b.U = &types.ChardevUdpWrapper{Data: *u}
	case types.ChardevBackendKindMux:
		base, ok := o.Get("chardev")
		if !ok {
			return nil, errors.New("chardev: mux: no chardev given")
		}
		b.U = &types.ChardevMuxWrapper{Data: types.ChardevMux{Chardev: base, Logfile: log, Logappend: appendLog}}
	case types.ChardevBackendKindRingbuf, types.ChardevBackendKindMemory:
		r := types.ChardevRingbuf{Logfile: log, Logappend: appendLog}
		if n := int64(o.Number("size")); n != 0 { // 0 is as if it were not given
			r.Size = &n
		}
		b.U = &types.ChardevRingbufWrapper{Data: r}
	default:
		b.U = &types.ChardevCommonWrapper{Data: types.ChardevCommon{Logfile: log, Logappend: appendLog}}
	}
	return b, nil
}

// chardevSocket reads the options of a socket. Unlike in the schema, server is off and wait is on
// by default.
func chardevSocket(o *cmdline.Opts) (*types.ChardevSocket, error) {
	path, unix := o.Get("path")
	fd, inherited := o.Get("fd")
	host, inet := o.Get("host")
	port, hasPort := o.Get("port")
	if unix && inherited || unix && inet || inherited && inet {
		return nil, errors.New("None or one of 'path', 'fd' or 'host' option required.")
	}
	if inet && !hasPort {
		return nil, errors.New("chardev: socket: no port given")
	}
	_, delay := o.Get("delay")
	_, nodelay := o.Get("nodelay")
	if delay && nodelay {
		return nil, errors.New("'delay' and 'nodelay' are mutually exclusive")
	}
	server := o.Bool("server", false)
	s := &types.ChardevSocket{Server: &server, Telnet: boolean(o, "telnet")}
	if _, given := o.Get("wait"); given || server {
		wait := o.Bool("wait", true)
		s.Wait = &wait
	}
	if delay || nodelay {
		now := !o.Bool("delay", true) || o.Bool("nodelay", false)
		s.Nodelay = &now
	}
	if _, given := o.Get("reconnect"); given {
		n := int64(o.Number("reconnect"))
		s.Reconnect = &n
	}
	switch {
	case unix:
		s.Addr = types.SocketAddressLegacy{Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddressWrapper{
			Data: types.UnixSocketAddress{Path: path, Abstract: boolean(o, "abstract"), Tight: boolean(o, "tight")}}}
	case inet:
		a := types.InetSocketAddress{Host: host, Port: port, Ipv4: boolean(o, "ipv4"), Ipv6: boolean(o, "ipv6")}
		if _, given := o.Get("to"); given {
			to := uint16(o.Number("to"))
			a.To = &to
		}
		s.Addr = types.SocketAddressLegacy{Type: types.SocketAddressTypeInet, U: &types.InetSocketAddressWrapper{Data: a}}
	default:
		s.Addr = types.SocketAddressLegacy{Type: types.SocketAddressTypeFd, U: &types.StringWrapper{Data: types.String{Str: fd}}}
	}
	return s, nil
}

// chardevUDP takes host, port, localaddr and localport; all but port have defaults.
func chardevUDP(o *cmdline.Opts) (*types.ChardevUdp, error) {
	inet := func(host, port string) types.SocketAddressLegacy {
		return types.SocketAddressLegacy{Type: types.SocketAddressTypeInet, U: &types.InetSocketAddressWrapper{
			Data: types.InetSocketAddress{Host: host, Port: port, Ipv4: boolean(o, "ipv4"), Ipv6: boolean(o, "ipv6")}}}
	}
	host, _ := o.Get("host")
	if host == "" {
		host = "localhost"
	}
	port, _ := o.Get("port")
	if port == "" {
		return nil, errors.New("chardev: udp: remote port not specified")
	}
	u := &types.ChardevUdp{Remote: inet(host, port)}
	localAddr, hasAddr := o.Get("localaddr")
	localPort, hasPort := o.Get("localport")
	if hasAddr || hasPort {
		if localPort == "" {
			localPort = "0"
		}
		local := inet(localAddr, localPort)
		u.Local = &local
	}
	return u, nil
}

func text(o *cmdline.Opts, name string) *string {
	if v, ok := o.Get(name); ok {
		return &v
	}
	return nil
}

func boolean(o *cmdline.Opts, name string) *bool {
	if _, ok := o.Get(name); !ok {
		return nil
	}
	v := o.Bool(name, false)
	return &v
}
