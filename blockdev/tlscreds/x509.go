package tlscreds

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"slices"
	"time"

	"qblockd/schema/types"
)

// X509 are credentials that are certificates.
type X509 struct {
	end    types.QCryptoTLSCredsEndpoint
	verify bool
	ca     authorities
	conf   *tls.Config
}

var _ Creds = (*X509)(nil)

// use is what the certificate at an end must be good for.
func use(end types.QCryptoTLSCredsEndpoint) x509.ExtKeyUsage {
	if end == types.QCryptoTLSCredsEndpointServer {
		return x509.ExtKeyUsageServerAuth
	}
	return x509.ExtKeyUsageClientAuth
}

// configure makes the settings of connections.
func (c *X509) configure(low, high uint16, own *tls.Certificate) {
	c.conf = &tls.Config{
		MinVersion: low, MaxVersion: high,
		SessionTicketsDisabled:      true, // who comes again is checked again
		DynamicRecordSizingDisabled: true,
	}
	if own != nil {
		c.conf.Certificates = []tls.Certificate{*own}
	}
	if c.end == types.QCryptoTLSCredsEndpointClient {
		c.conf.InsecureSkipVerify = true // Client verifies
		return
	}
	if c.verify {
		c.conf.ClientCAs = c.ca.roots
		c.conf.ClientAuth = tls.RequestClientCert // that it comes is for checkClient
		c.conf.VerifyConnection = c.checkClient
		if low < tls.VersionTLS13 && high >= tls.VersionTLS13 {
			older := c.conf.Clone()
			older.MaxVersion = tls.VersionTLS12
			c.conf.GetConfigForClient = func(h *tls.ClientHelloInfo) (*tls.Config, error) {
				if isGnuTLS(h) {
					return older, nil
				}
				return nil, nil
			}
		}
	}
}

// isGnuTLS tells whether a client is a program with GnuTLS, such as QEMU and libnbd. With TLS 1.3
// they send no certificate that has an RSA key unless they are told that signatures of PKCS #1 are
// taken, which RFC 8446 forbids to say, and crypto/tls does not. So TLS 1.2 is for them, where they
// have to have a certificate. They are known by two extensions that others do not send together,
// encrypt_then_mac (RFC 7366) and record_size_limit (RFC 8449).
func isGnuTLS(h *tls.ClientHelloInfo) bool {
	return slices.Contains(h.Extensions, 22) && slices.Contains(h.Extensions, 28)
}

// Endpoint implements Creds.
func (c *X509) Endpoint() types.QCryptoTLSCredsEndpoint { return c.end }

// KnowsPeer implements Creds.
func (c *X509) KnowsPeer() bool { return c.verify }

func (c *X509) checkClient(s tls.ConnectionState) error {
	if len(s.PeerCertificates) == 0 {
		return errNoCertificate
	}
	if _, err := distinguishedName(s.PeerCertificates[0].RawSubject); err != nil {
		return rejected(err.Error())
	}
	return c.ca.check(s.PeerCertificates, x509.ExtKeyUsageClientAuth)
}

// Server implements Creds.
func (c *X509) Server(nc net.Conn) (*Conn, error) {
	conn, err := c.shake(nc, func(wire net.Conn) *tls.Conn { return tls.Server(wire, c.conf) })
	if errors.As(err, new(rejected)) {
		lastWords(nc)
	}
	return conn, err
}

// lastWait is how long a client that is not wanted is listened to.
const lastWait = 300 * time.Millisecond

// lastWords gives a client that is still sending the time to see why it is not wanted: else its
// kernel drops what it has not read.
func lastWords(nc net.Conn) {
	if c, ok := nc.(interface{ CloseWrite() error }); ok && c.CloseWrite() == nil {
		_ = nc.SetReadDeadline(time.Now().Add(lastWait))
		_, _ = io.CopyN(io.Discard, nc, 64<<10)
	}
}

// Client implements Creds.
func (c *X509) Client(nc net.Conn, host string) (*Conn, error) {
	conf := c.conf.Clone()
	conf.ServerName = host
	if c.verify {
		conf.VerifyConnection = func(s tls.ConnectionState) error {
			if err := c.ca.check(s.PeerCertificates, x509.ExtKeyUsageServerAuth); err != nil {
				return err
			}
			return checkHost(s.PeerCertificates[0], host)
		}
	}
	return c.shake(nc, func(wire net.Conn) *tls.Conn { return tls.Client(wire, conf) })
}

func (c *X509) shake(nc net.Conn, under func(wire net.Conn) *tls.Conn) (*Conn, error) {
	conn, err := NewConn(nc, under, func(t *tls.Conn) string {
		if !c.verify {
			return ""
		}
		name, _ := distinguishedName(t.ConnectionState().PeerCertificates[0].RawSubject) // a client's was read before
		return name
	})
	var r rejected
	if errors.As(err, &r) {
		return nil, r
	}
	if err != nil {
		return nil, &shakeError{err}
	}
	return conn, nil
}
