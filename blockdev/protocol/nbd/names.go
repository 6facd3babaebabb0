package nbd

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"qblockd/blockdev/driver"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// defaultPort is that of servers whose URI names none.
const defaultPort = "10809"

var errURI = errors.New("No valid URL specified")

// fromName makes options of a file name: a URI, or "nbd:unix:PATH:exportname=NAME" or
// "nbd:HOST:PORT:exportname=NAME" without a name of the export or with one. What a name leaves
// open is found missing when the node is opened, as in QEMU.
func fromName(name string) (*types.BlockdevOptionsNbd, error) {
	if strings.Contains(name, "://") {
		return fromURI(name)
	}
	o := &types.BlockdevOptionsNbd{}
	name, export, given := strings.Cut(name, ":exportname=")
	if given && export == "" {
		return o, nil
	}
	if given {
		o.Export = &export
	}
	rest, ok := strings.CutPrefix(name, "nbd:")
	if !ok {
		return nil, errors.New("File name string for NBD must start with 'nbd:'")
	}
	if path, ok := strings.CutPrefix(rest, "unix:"); ok {
		o.Server = unixServer(path)
	} else if rest != "" {
		host, port, err := hostPort(rest)
		if err != nil {
			return nil, err
		}
		o.Server = inetServer(host, port)
	}
	return o, nil
}

func unixServer(path string) types.SocketAddress {
	return types.SocketAddress{Type: types.SocketAddressTypeUnix, U: &types.UnixSocketAddress{Path: path}}
}

func inetServer(host, port string) types.SocketAddress {
	return types.SocketAddress{
		Type: types.SocketAddressTypeInet, U: &types.InetSocketAddress{Host: host, Port: port},
	}
}

// hostPort parses HOST:PORT or [HOST]:PORT. Options behind a comma do not count, as in QEMU.
func hostPort(s string) (host, port string, err error) {
	addr, _, _ := strings.Cut(s, ",")
	if rest, ok := strings.CutPrefix(addr, "["); ok {
		host, port, ok = strings.Cut(rest, "]:")
		if !ok || host == "" || port == "" {
			return "", "", fmt.Errorf("error parsing IPv6 address '%s'", s)
		}
		return host, port, nil
	}
	host, port, ok := strings.Cut(addr, ":")
	switch {
	case ok && host == "" && port == "":
		return "", "", fmt.Errorf("error parsing port in address '%s'", s)
	case !ok || port == "":
		return "", "", fmt.Errorf("error parsing address '%s'", s)
	}
	return host, port, nil
}

// fromURI parses nbd://HOST[:PORT][/EXPORT], nbd+tcp:// alike, and
// nbd+unix:///[EXPORT]?socket=PATH.
func fromURI(name string) (*types.BlockdevOptionsNbd, error) {
	u, err := url.Parse(name)
	if err != nil || u.Opaque != "" {
		return nil, errURI
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, errURI
	}
	o := &types.BlockdevOptionsNbd{}
	if export := strings.TrimPrefix(u.Path, "/"); export != "" {
		o.Export = &export
	}
	if u.Scheme == "nbd+unix" {
		socket := query["socket"]
		if u.Host != "" || len(query) != 1 || len(socket) != 1 {
			return nil, errURI
		}
		o.Server = unixServer(socket[0])
		return o, nil
	}
	host, port := u.Hostname(), u.Port()
	if u.Scheme != "nbd" && u.Scheme != "nbd+tcp" || host == "" || len(query) > 0 {
		return nil, errURI
	}
	if port == "" {
		if port = defaultPort; strings.HasSuffix(u.Host, ":") {
			return nil, errURI
		}
	} else {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil {
			return nil, errURI
		}
		port = strconv.FormatUint(n, 10)
	}
	o.Server = inetServer(host, port)
	return o, nil
}

// filename is the URI that opens an equal node, "" if none does.
func filename(o *types.BlockdevOptionsNbd) string {
	export := ""
	if o.Export != nil {
		export = "/" + *o.Export
	}
	switch a := o.Server.U.(type) {
	case *types.UnixSocketAddress:
		return "nbd+unix://" + export + "?socket=" + a.Path
	case *types.InetSocketAddress:
		if a.Ipv4 == nil && a.Ipv6 == nil && a.To == nil {
			return "nbd://" + a.Host + ":" + a.Port + export
		}
	}
	return ""
}

// strong gives the options that say what is read, for names in JSON. Those of the server stand
// there one by one, as QEMU writes them.
func strong(o *types.BlockdevOptionsNbd, add func(name string, v value.Value)) {
	if o.Export != nil {
		add("export", *o.Export)
	}
	driver.AddGiven(add, "tls-creds", o.TlsCreds)
	driver.AddGiven(add, "tls-hostname", o.TlsHostname)
	v, err := value.Parse(string(o.Server.AppendJSON(nil)))
	if err != nil {
		panic("nbd: " + err.Error())
	}
	for _, m := range slices.Backward(v.(*value.Dict).Members()) { // so that they come out in QEMU's order
		add("server."+m.Name, m.Value)
	}
}
