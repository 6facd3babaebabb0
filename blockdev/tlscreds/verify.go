package tlscreds

import (
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"net"
	"time"
)

// rejected is why a certificate, of a peer or our own, is not good enough, in QEMU's words.
type rejected string

func (e rejected) Error() string { return string(e) }

const (
	errNoCertificate = rejected("Verify failed: No certificate was found.")
	errNoHost        = rejected("No hostname for certificate validation")
	errUnknown       = rejected("The certificate hasn't got a known issuer")
	errRevoked       = rejected("The certificate has been revoked")
	errInsecure      = rejected("The certificate uses an insecure algorithm")
	errUntrusted     = rejected("The certificate is not trusted")
	errPurpose       = rejected("The certificate's purpose does not allow its use")
	errOldList       = rejected("The list of revoked certificates is out of date")
)

// minRSA is the shortest RSA key that is taken, in bits.
const minRSA = 1024

// authorities are those whose certificates count, and what they have taken back.
type authorities struct {
	certs []*x509.Certificate
	roots *x509.CertPool
	lists []*x509.RevocationList
}

// check checks a chain, whose first is about the peer, for a use.
func (a *authorities) check(chain []*x509.Certificate, use x509.ExtKeyUsage) error {
	o := x509.VerifyOptions{
		Roots: a.roots, Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{use}, CurrentTime: time.Now(),
	}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	found, err := chain[0].Verify(o)
	if err != nil {
		return a.word(chain, err)
	}
	for _, chain := range found {
		if err = a.revoked(chain, o.CurrentTime); err == nil {
			return nil
		}
	}
	return err
}

// word is why a chain is not good enough.
func (a *authorities) word(chain []*x509.Certificate, err error) error {
	var invalid x509.CertificateInvalidError
	switch {
	case weak(chain[0]):
		return errInsecure
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return errPurpose
	case !errors.As(err, new(x509.UnknownAuthorityError)):
		return errUntrusted
	}
	for _, c := range a.certs {
		if string(c.RawSubject) != string(chain[0].RawIssuer) {
			continue
		}
		if k, ok := c.PublicKey.(*rsa.PublicKey); ok && k.N.BitLen() < minRSA {
			return errInsecure
		}
		if c.BasicConstraintsValid && !c.IsCA || c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0 {
			return errUntrusted
		}
	}
	return errUnknown
}

// weak tells whether somebody else might have made the signature.
func weak(c *x509.Certificate) bool {
	switch c.SignatureAlgorithm {
	case x509.MD2WithRSA, x509.MD5WithRSA, x509.SHA1WithRSA, x509.ECDSAWithSHA1, x509.DSAWithSHA1, x509.DSAWithSHA256:
		return true
	}
	k, ok := c.PublicKey.(*rsa.PublicKey)
	return ok && k.N.BitLen() < minRSA
}

// revoked looks a chain up in the lists of those who signed it.
func (a *authorities) revoked(chain []*x509.Certificate, now time.Time) error {
	for i, c := range chain[:len(chain)-1] {
		for _, l := range a.lists {
			if string(l.RawIssuer) != string(c.RawIssuer) || l.CheckSignatureFrom(chain[i+1]) != nil {
				continue
			}
			if now.Before(l.ThisUpdate) || !l.NextUpdate.IsZero() && now.After(l.NextUpdate) {
				return errOldList
			}
			for _, e := range l.RevokedCertificateEntries {
				if e.SerialNumber.Cmp(c.SerialNumber) == 0 {
					return errRevoked
				}
			}
		}
	}
	return nil
}

// checkHost checks that the certificate is that of a host. Without names of hosts in the place for
// them the common name counts.
func checkHost(c *x509.Certificate, host string) error {
	if host == "" {
		return errNoHost
	}
	if len(c.DNSNames) == 0 && net.ParseIP(host) == nil {
		named := *c
		named.DNSNames = []string{c.Subject.CommonName}
		named.IPAddresses = nil
		c = &named
	}
	if c.VerifyHostname(host) != nil {
		return rejected("Certificate does not match the hostname " + host)
	}
	return nil
}
