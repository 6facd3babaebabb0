package main

import (
	"fmt"
	"runtime/debug"
)

func versionText(prog string) string {
	rev := ""
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				rev = " (" + s.Value[:12] + ")"
			}
		}
	}
	return fmt.Sprintf("%s version %s%s\nA drop-in for the QEMU %d.%d storage daemon. Apache License 2.0.\n",
		prog, version, rev, qemuMajor, qemuMinor)
}

func helpText(prog string) string {
	return fmt.Sprintf(`Usage: %s [options]
Block devices as a service: open disk images, export them, and work on them live, over QMP.
Options take effect strictly from left to right: define what another option names before it.

  -h, --help             show this text and exit
  -V, --version          show the version and exit
  -T, --trace [enable=]<pattern>
                         log the trace points that match; 'help' lists them

  --blockdev [driver=]<driver>,node-name=<name>[,<option>=<value>...]
                         open a block node, as QMP blockdev-add does; nested options are
                         dotted (file.driver=file), or the whole may be JSON
  --chardev <backend>,id=<id>[,<option>=<value>...]
                         make a character device, for instance
                         socket,id=m,path=qmp.sock,server=on,wait=off; 'help' lists the backends
  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         speak QMP on a character device, to any number of clients at once
  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,max-connections=<n>]
                         start the NBD server
  --export [type=]nbd,id=<id>,node-name=<node>[,name=<name>][,writable=on|off]
                         export a node over NBD; needs --nbd-server before it
  --object <type>,id=<id>[,<property>=<value>...]
                         make an object; 'help' lists the types, '<type>,help' their properties

  --daemonize            go to the background once everything above is up
  --pidfile <path>       write the process id to a file, locked while the daemon lives
  --socket-mode <octal>  permissions of the socket files made after this option (default 0600)
  --quickstart <dir>     serve a new disk with a monitor and an NBD server, all below <dir>,
                         and show what to try
`, prog)
}
