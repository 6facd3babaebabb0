// Package load puts more clients on a daemon than are good for it: thousands of connections that
// are never used, clients that never read, clients that come before the daemon is up. It looks at
// what the others notice, at memory, and at what is left when all have gone. Everything runs on
// unix sockets.
package load
