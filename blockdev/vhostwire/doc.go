// Package vhostwire is the vhost-user protocol as bytes: the messages by which a front end, a
// virtual machine say, tells a back end where guest memory and virtqueues are, and what the back
// end answers. It does no I/O; file descriptors that come with messages are only counted. Both
// directions are here: the back end parses with Message.Parse what front ends, and tests, make with
// Message.Append.
//
// A message is a header (request, flags, size of the payload; 32 bits each) and a payload. Numbers
// are those of the machine; on all that we run on that is little endian. Descriptors come as
// SCM_RIGHTS with the first byte of the header. A reply has the number of its request.
//
// Source: QEMU, docs/interop/vhost-user.rst ("vhost-user Protocol").
package vhostwire
