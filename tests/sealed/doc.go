// Package sealed does random things to chains of encrypted and plain images on a real daemon, and
// compares what is there with plain bytes: luks, qcow2 with LUKS inside, qcow2 with the password
// as key (aes), plain qcow2 and raw, a key of its own for each, overlays of all over all. A trial
// writes, zeroes, resizes, takes snapshots (over the disk and inside), adds, erases and changes
// keys and bitmaps, commits, streams, mirrors and backs up, ends the daemon in order or kills it,
// also in the middle of a commit that has to make an encrypted base longer. Each end is looked at:
// the disk through NBD, and the files with qemu-img (7.2, and 10.0 where it is installed), which
// has to read the same and to find nothing wrong.
//
// A trial is drawn from its seed:
//
//	go test ./tests/sealed -run TestTrials -sealed.seed=N -sealed.trials=1 -v
//
//	world.go  a daemon, the chain, the bytes it should have
//	ops.go    what is done
//	check.go  what is there
//
// Tests only.
package sealed
