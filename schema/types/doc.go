// Package types holds the Go types of the QMP interface: structs, enums, unions,
// events, decoders, encoders and handler interfaces, generated from schema/qapi.
// The files *.gen.go are written by cmd/qapigen (go generate ./schema/...), the others by hand.
//
// Names: BlockdevOptionsQcow2 stays; node-name becomes NodeName, job-id JobID,
// query-jobs QueryJobs, BLOCK_JOB_READY BlockJobReadyEvent, the arguments of
// block-stream BlockStreamArgs, the value io_uring of BlockdevAioOptions
// BlockdevAioOptionsIoUring.
//
// Members that may be left out are pointers, except lists and any (nil: absent).
// The members of a union's branch are in its field U, a pointer to the branch's
// struct. Of an alternate's fields exactly one is set.
package types
