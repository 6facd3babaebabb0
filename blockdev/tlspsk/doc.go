// Package tlspsk is TLS 1.3 (RFC 8446) between two ends that share a key and have no certificates,
// which crypto/tls does not have. It does no I/O but on the connection that it is given.
//
//	config.go    what an end has to know: Config
//	conn.go      a connection: Conn
//	read.go      what comes in
//	write.go     what goes out
//	record.go    records, and the keys of one direction
//	schedule.go  from the shared key to all others
//	message.go   messages of the handshake as bytes
//	hello.go     the first two of them
//	client.go    the handshake, from either end
//	server.go
//	alert.go     how one end tells the other that it gives up
//
// # What is negotiated
//
// The key proves who the ends are; a Diffie-Hellman exchange with X25519 or P-256 makes sure that
// whoever learns it later cannot read what was sent (psk_dhe_ke). A key belongs to a hash: with
// SHA-256, which is what everybody takes who does not say otherwise, the ciphers are AES-128 in GCM
// and ChaCha20-Poly1305, with SHA-384 it is AES-256 in GCM. Older versions of TLS, certificates,
// resumption, early data and compression do not exist here. What a peer offers of them is not
// taken, and who insists is told so by an alert.
//
// # Limits
//
// A peer that has proved nothing yet makes an end keep at most a message of maxMessage bytes, and
// the input of a record. One that has can do no more than to keep its own connection busy: records
// without data are counted (maxUseless). A handshake takes as long as the deadlines of the
// connection below allow.
//
// # What a key does not say
//
// Who has a key is taken for who it names, at either end: a key that several share, or that one
// uses as a client and as a server, lets each of them stand for the other (RFC 9257, 4.1). Without
// a key nobody finds out which names there are; who has one can, by naming it behind another, since
// a server takes the first that it knows (RFC 8446, 4.2.11).
//
// # What is wiped
//
// The shared key is not kept after the handshake, and each secret is wiped as soon as the next has
// been made of it; the last go with Close. What the ciphers and hashes of the standard library keep
// inside cannot be reached: it is garbage from then on.
package tlspsk
