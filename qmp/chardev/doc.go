// Package chardev provides the character devices of the daemon: sockets, files, pipes, terminals
// and ring buffers, each known by a label. A device is where a monitor finds its clients.
//
//	Table --label--> device --stream per client--> the handler given to Table.Attach
//
// A device without a handler exists all the same: it listens, connects, shows up in queries. A
// handler runs once for each client on a goroutine of the device, and the client leaves when it
// returns. A listening socket has any number of clients at a time; all other devices have one.
//
// Sockets in the file system come into being with their final mode, which by default lets only the
// daemon's user connect; a socket that stood at the path before is removed first, as by QEMU, and
// the socket itself is removed when the device ends.
package chardev
