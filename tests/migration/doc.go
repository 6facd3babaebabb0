// Package migration moves disks from one daemon to another under guests that write: a mirror with
// copy-mode write-blocking over TCP and TLS, through a wire that is cut in between, and the guests
// go on at the other end. Every byte that was acknowledged is there. Where the tests run as root
// the daemons live in network namespaces with a cable between them, which is unplugged, too.
//
//	hosts_test.go      where the daemons live
//	wire_test.go       the wire between them
//	guest_test.go      who writes meanwhile
//	migration_test.go  the migration, as management tools do it
//	kill_test.go       the source is killed in the middle
package migration
