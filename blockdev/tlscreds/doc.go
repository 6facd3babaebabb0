// Package tlscreds is TLS with credentials that clients of the daemon name as objects: for the NBD
// server, the driver nbd and character devices.
//
//	creds.go     what credentials are to their users: Creds, and how objects are found
//	conn.go      a connection under TLS
//	wire.go      what lies below: records of one write in one system call
//	x509.go      credentials that are certificates
//	psk.go       credentials that are keys
//	load.go      their files, and what is wrong with certificates of our own
//	key.go       keys, also such as a password protects
//	verify.go    what is wrong with certificates of others
//	text.go      what failed, in the words of QEMU and GnuTLS
//	name.go      the name in a certificate
//	priority.go  GnuTLS' notation of what may be negotiated
//
// Another kind of credentials makes its connections by NewConn, and implements Creds.
//
// # What is and what is not secret
//
// Files with keys, and passwords, are wiped as soon as they are parsed. Neither the texts of errors
// nor the log have anything of them. Keys in memory go with their last user: crypto/tls has copies
// of them that cannot be wiped.
package tlscreds
