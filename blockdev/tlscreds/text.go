package tlscreds

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"

	"qblockd/blockdev/tlspsk"
	"qblockd/graph/blk"
)

// ChannelError is why nothing more can be read from, or written to, a connection under TLS, in
// QEMU's words: what is behind it is not told apart, but for an end that the peer did not announce.
type ChannelError struct {
	text  string
	cause error
}

func (e *ChannelError) Error() string { return e.text }

// Unwrap is the error of the connection below, or of what makes records.
func (e *ChannelError) Unwrap() error { return e.cause }

// channelError words an error of reading or writing: those of deadlines and of our own Close are
// for who has set or called them. ended tells that the connection below has come to its end.
func channelError(what string, err error, ended bool) error {
	errno := syscall.EIO
	switch {
	case err == nil, errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, net.ErrClosed):
		return err
	case err == io.EOF && !ended:
		return err // the peer has said so
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		errno = syscall.ECONNABORTED
	}
	return &ChannelError{what + ": " + blk.ErrnoText(errno), err}
}

// shakeError is why a handshake failed.
type shakeError struct{ cause error }

func (e *shakeError) Error() string { return "TLS handshake failed: " + shakeText(e.cause) }
func (e *shakeError) Unwrap() error { return e.cause }

// Alert is what the peer has said when it gave up, "" if an error is about something else. QEMU's
// texts do not have it.
func Alert(err error) string {
	var op *net.OpError
	var told tlspsk.RemoteError
	switch {
	case errors.As(err, &told):
		return tlspsk.Alert(told).String()
	case errors.As(err, &op) && op.Op == "remote error":
		return strings.TrimPrefix(op.Err.Error(), "tls: ")
	}
	return ""
}

// gnuTexts are GnuTLS' words for what crypto/tls tells by the beginning of a text alone.
var gnuTexts = []struct{ ours, theirs string }{
	{"server selected unsupported protocol version ", unsupportedVersion},
	{"client offered only unsupported versions: ", unsupportedVersion},
	{"no cipher suite supported by both client and server", "No supported cipher suites have been found."},
}

const unsupportedVersion = "A packet with illegal or unsupported version was received."

// shakeText words why a handshake failed, as GnuTLS does.
func shakeText(err error) string {
	var op *net.OpError
	var local *tlspsk.LocalError
	switch {
	case Alert(err) != "":
		return "A TLS fatal alert has been received."
	case errors.As(err, &local) && local.Alert == tlspsk.ProtocolVersion:
		return unsupportedVersion
	case errors.As(err, new(tls.RecordHeaderError)):
		return "An unexpected TLS packet was received."
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return "The TLS connection was non-properly terminated."
	case errors.Is(err, os.ErrDeadlineExceeded):
		return "The operation timed out"
	case errors.As(err, &op) && op.Op == "write":
		return "Error in the push function."
	case errors.As(err, &op) && op.Op == "read":
		return "Error in the pull function."
	}
	text := strings.TrimPrefix(err.Error(), "tls: ")
	for _, t := range gnuTexts {
		if strings.HasPrefix(text, t.ours) {
			return t.theirs
		}
	}
	return text
}
