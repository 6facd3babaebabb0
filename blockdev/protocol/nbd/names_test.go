package nbd

import (
	"testing"

	"qblockd/schema/types"
)

// What QEMU 7.2 makes of file names, and how it shows them again.
func TestNames(t *testing.T) {
	for name, want := range map[string]string{
		"nbd:unix:/s":                            "nbd+unix://?socket=/s",
		"nbd:unix:/s:exportname=a:b":             "nbd+unix:///a:b?socket=/s",
		"nbd:unix:/s:exportname=y:exportname=z":  "nbd+unix:///y:exportname=z?socket=/s",
		"nbd:unix:/s:exportname=a%20b":           "nbd+unix:///a%20b?socket=/s",
		"nbd+unix:///x?socket=/s":                "nbd+unix:///x?socket=/s",
		"nbd+unix:///?socket=/s":                 "nbd+unix://?socket=/s",
		"nbd+unix://?socket=/s":                  "nbd+unix://?socket=/s",
		"nbd+unix:////x?socket=/s":               "nbd+unix:////x?socket=/s",
		"nbd+unix:///a%20b?socket=/s%20t":        "nbd+unix:///a b?socket=/s t",
		"nbd+unix:///a/b/?socket=/s":             "nbd+unix:///a/b/?socket=/s",
		"nbd://127.0.0.1":                        "nbd://127.0.0.1:10809",
		"nbd://127.0.0.1:10999/":                 "nbd://127.0.0.1:10999",
		"nbd://127.0.0.1:10999//a":               "nbd://127.0.0.1:10999//a",
		"nbd://127.0.0.1:10999/a?":               "nbd://127.0.0.1:10999/a",
		"nbd://localhost:10999/a/b#f":            "nbd://localhost:10999/a/b",
		"nbd://u@localhost:10999/x":              "nbd://localhost:10999/x",
		"nbd://127.0.0.1:010999/x":               "nbd://127.0.0.1:10999/x",
		"nbd+tcp://h:1/x":                        "nbd://h:1/x",
		"nbd:127.0.0.1:10999":                    "nbd://127.0.0.1:10999",
		"nbd:127.0.0.1:1,ipv6=off:exportname=q":  "nbd://127.0.0.1:1/q",
		"nbd:127.0.0.1:1:exportname=q,ipv6=off":  "nbd://127.0.0.1:1/q,ipv6=off",
		"nbd:127.0.0.1:1,bogus=1":                "nbd://127.0.0.1:1",
		"nbd:[::1]:10998":                        "nbd://::1:10998",
		"nbd://[::1]:10998/x":                    "nbd://::1:10998/x",
		"nbd:h:http:exportname=x":                "nbd://h:http/x",
		"nbd:":                                   "error: NBD server address missing",
		"nbd:unix:/x:exportname=":                "error: NBD server address missing",
		"nbd:host":                               "error: error parsing address 'host'",
		"nbd:h:":                                 "error: error parsing address 'h:'",
		"nbd:,x":                                 "error: error parsing address ',x'",
		"nbd::":                                  "error: error parsing port in address ':'",
		"nbd:[::1]":                              "error: error parsing IPv6 address '[::1]'",
		"nbd:[]:1":                               "error: error parsing IPv6 address '[]:1'",
		"nbd+unix:x?socket=/s":                   "error: File name string for NBD must start with 'nbd:'",
		"nbd://":                                 "error: No valid URL specified",
		"nbd:///x":                               "error: No valid URL specified",
		"nbd://h/x?socket=y":                     "error: No valid URL specified",
		"nbd://h:abc/x":                          "error: No valid URL specified",
		"nbd://h:99999/x":                        "error: No valid URL specified",
		"nbd://h:/x":                             "error: No valid URL specified",
		"nbd+unix:///x":                          "error: No valid URL specified",
		"nbd+unix:///x?socket=/s&a=b":            "error: No valid URL specified",
		"nbd+unix://h/x?socket=/s":               "error: No valid URL specified",
		"nbd+unix:///x?sock=/s":                  "error: No valid URL specified",
		"nbd+unix:///x?socket=/s&socket=/also/s": "error: No valid URL specified",
	} {
		got := ""
		o, err := fromName(name)
		if err == nil {
			err = check(o)
		}
		if err != nil {
			got = "error: " + err.Error()
		} else {
			got = filename(o)
		}
		if got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

// Servers that no URI tells of have no plain name.
func TestNoPlainName(t *testing.T) {
	no := false
	for _, a := range []types.SocketAddress{
		{Type: "inet", U: &types.InetSocketAddress{Host: "h", Port: "1", Ipv6: &no}},
		{Type: "fd", U: &types.String{Str: "5"}},
	} {
		if got := filename(&types.BlockdevOptionsNbd{Server: a}); got != "" {
			t.Errorf("%s: %s", a.Type, got)
		}
	}
}
