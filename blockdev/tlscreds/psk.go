package tlscreds

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"

	"qblockd/blockdev/crypto"
	"qblockd/blockdev/tlspsk"
	"qblockd/schema/types"
)

// PSK are credentials that are keys which both ends have.
type PSK struct {
	end types.QCryptoTLSCredsEndpoint
	dir string // of the file with the keys
	// A client's. The key goes with the last who uses the credentials.
	username string
	key      *crypto.Key
}

var _ Creds = (*PSK)(nil)

// pskWords in a priority say that keys are to be used, which is so anyway.
var pskWords = strings.NewReplacer(":+ECDHE-PSK", "", ":+DHE-PSK", "", ":+PSK", "")

// NewPSK reads the key of a client. A server reads its keys when somebody connects, as QEMU does,
// so that keys come and go while it runs. Source of the file's name and form: QEMU's documentation
// of TLS.
func NewPSK(p *types.TlsCredsPskProperties) (*PSK, error) {
	priority := cmp.Or(types.Or(p.Priority, ""), "NORMAL")
	_, high, err := ParsePriority(pskWords.Replace(priority))
	if err != nil {
		return nil, err
	}
	if high < tls.VersionTLS13 {
		return nil, fmt.Errorf("Cannot set TLS session priority %s: with keys, there is no version but TLS 1.3", priority)
	}
	c := &PSK{end: types.Or(p.Endpoint, types.QCryptoTLSCredsEndpointClient)}
	switch {
	case c.end == types.QCryptoTLSCredsEndpointServer && p.Username != nil:
		return nil, errors.New("username should not be set when endpoint=server")
	case p.Dir == nil:
		return nil, errors.New("Missing 'dir' property value")
	}
	c.dir = *p.Dir
	path, file, err := (&loader{dir: c.dir}).read("keys.psk", true)
	defer clear(file)
	if err != nil {
		return nil, err
	}
	if c.end == types.QCryptoTLSCredsEndpointServer {
		return c, nil
	}
	c.username = types.Or(p.Username, "qemu")
	text, ok := findKey(file, c.username, false)
	if !ok || c.username == "" {
		return nil, fmt.Errorf("Username %s not found in PSK file %s", c.username, path)
	}
	key, ok := parsePSK(text)
	defer clear(key)
	if !ok {
		return nil, errors.New("Cannot set PSK client credentials: Error in parsing.")
	}
	if c.key, err = crypto.CopyKey(key); err != nil {
		return nil, err
	}
	runtime.AddCleanup(c, (*crypto.Key).Close, c.key)
	return c, nil
}

// findKey is what stands behind a name in a file of lines NAME:KEY. With coded, a name behind a #
// is in hexadecimal, which servers with GnuTLS take.
func findKey(file []byte, name string, coded bool) (key []byte, ok bool) {
	for line := range bytes.SplitSeq(file, []byte("\n")) {
		n, key, ok := bytes.Cut(line, []byte(":"))
		if !ok {
			continue
		}
		if code, is := bytes.CutPrefix(n, []byte("#")); is && coded {
			var err error
			if n, err = hex.DecodeString(string(code)); err != nil {
				continue
			}
		}
		if string(n) == name {
			return bytes.TrimSuffix(key, []byte("\r")), true
		}
	}
	return nil, false
}

// parsePSK reads a key in hexadecimal.
func parsePSK(text []byte) (key []byte, ok bool) {
	key = make([]byte, hex.DecodedLen(len(text)))
	if _, err := hex.Decode(key, text); err != nil || len(key) == 0 {
		clear(key)
		return nil, false
	}
	return key, true
}

// Endpoint implements Creds.
func (c *PSK) Endpoint() types.QCryptoTLSCredsEndpoint { return c.end }

// KnowsPeer implements Creds: who has a key has its name.
func (c *PSK) KnowsPeer() bool { return true }

// lookup is for the handshake, which wipes the key.
func (c *PSK) lookup(identity string) ([]byte, bool) {
	_, file, err := (&loader{dir: c.dir}).read("keys.psk", true)
	defer clear(file)
	if err != nil {
		return nil, false
	}
	text, ok := findKey(file, identity, true)
	if !ok {
		return nil, false
	}
	return parsePSK(text)
}

// Server implements Creds.
func (c *PSK) Server(nc net.Conn) (*Conn, error) {
	return c.shake(nc, func(wire net.Conn) *tlspsk.Conn {
		return tlspsk.Server(wire, tlspsk.Config{Lookup: c.lookup})
	})
}

// Client implements Creds. A host has no name in keys.
func (c *PSK) Client(nc net.Conn, _ string) (*Conn, error) {
	return c.shake(nc, func(wire net.Conn) *tlspsk.Conn {
		return tlspsk.Client(wire, tlspsk.Config{Identity: c.username, Key: c.key.Bytes()})
	})
}

func (c *PSK) shake(nc net.Conn, under func(wire net.Conn) *tlspsk.Conn) (*Conn, error) {
	conn, err := NewConn(nc, under, (*tlspsk.Conn).Peer)
	runtime.KeepAlive(c) // its key is wiped after it
	if err != nil {
		return nil, &shakeError{err}
	}
	return conn, nil
}
