package tlspsk

import "fmt"

// Alert is what one end tells the other. Source: RFC 8446, 6.
type Alert uint8

// Alerts.
const (
	CloseNotify          Alert = 0
	UnexpectedMessage    Alert = 10
	BadRecordMAC         Alert = 20
	RecordOverflow       Alert = 22
	HandshakeFailure     Alert = 40
	IllegalParameter     Alert = 47
	DecodeError          Alert = 50
	DecryptError         Alert = 51
	ProtocolVersion      Alert = 70
	InternalError        Alert = 80
	UserCanceled         Alert = 90
	MissingExtension     Alert = 109
	UnsupportedExtension Alert = 110
	UnknownPSKIdentity   Alert = 115
)

var alerts = map[Alert]string{
	CloseNotify:          "close notify",
	UnexpectedMessage:    "unexpected message",
	BadRecordMAC:         "bad record MAC",
	RecordOverflow:       "record overflow",
	HandshakeFailure:     "handshake failure",
	IllegalParameter:     "illegal parameter",
	DecodeError:          "error decoding message",
	DecryptError:         "error decrypting message",
	ProtocolVersion:      "protocol version not supported",
	InternalError:        "internal error",
	UserCanceled:         "user canceled",
	MissingExtension:     "missing extension",
	UnsupportedExtension: "unsupported extension",
	UnknownPSKIdentity:   "unknown PSK identity",
}

// String implements fmt.Stringer.
func (a Alert) String() string {
	if s, ok := alerts[a]; ok {
		return s
	}
	return fmt.Sprintf("alert %d", uint8(a))
}

// RemoteError is why the peer gave up.
type RemoteError Alert

// Error implements error.
func (e RemoteError) Error() string { return "remote error: " + Alert(e).String() }

// LocalError is why this end gave up, and what the peer was told if that could be done.
type LocalError struct {
	Alert Alert
	Text  string
}

// Error implements error.
func (e *LocalError) Error() string { return e.Text }

func fail(a Alert, text string) error { return &LocalError{a, text} }
