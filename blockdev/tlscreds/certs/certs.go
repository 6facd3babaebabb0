// Package certs makes authorities, certificates and keys for tests: sound ones, and such as are
// wrong in one way.
package certs

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

var serial atomic.Int64

// Cert is a certificate with its key.
type Cert struct {
	*x509.Certificate
	DER []byte
	Key crypto.Signer
}

// Change makes a certificate another one.
type Change func(c *x509.Certificate)

// CA makes an authority.
func CA(t testing.TB, changes ...Change) *Cert {
	t.Helper()
	c := template("Test CA")
	c.IsCA, c.BasicConstraintsValid = true, true
	c.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	return sign(t, c, nil, changes)
}

// Server makes the certificate of a server called localhost.
func (ca *Cert) Server(t testing.TB, changes ...Change) *Cert {
	t.Helper()
	c := template("localhost")
	c.DNSNames, c.IPAddresses = []string{"localhost"}, []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	return sign(t, c, ca, changes)
}

// ClientSubject is whom Client makes a certificate for, as QEMU writes it.
const ClientSubject = "C=GB,ST=London,L=London,O=Example Home,CN=laptop.example.com"

// Client makes the certificate of a client.
func (ca *Cert) Client(t testing.TB, changes ...Change) *Cert {
	t.Helper()
	c := template("laptop.example.com")
	c.Subject.Country, c.Subject.Province, c.Subject.Locality = []string{"GB"}, []string{"London"}, []string{"London"}
	c.Subject.Organization = []string{"Example Home"}
	c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return sign(t, c, ca, changes)
}

func template(name string) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber:          big.NewInt(serial.Add(1)),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
		BasicConstraintsValid: true,
	}
}

// sign makes the certificate c of a new key, signed by ca; nil: by itself.
func sign(t testing.TB, c *x509.Certificate, ca *Cert, changes []Change) *Cert {
	t.Helper()
	for _, f := range changes {
		f(c)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	issuer, issuerKey := c, crypto.Signer(key)
	if ca != nil {
		issuer, issuerKey = ca.Certificate, ca.Key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, issuer, key.Public(), issuerKey)
	must(t, err)
	parsed, err := x509.ParseCertificate(der)
	must(t, err)
	return &Cert{parsed, der, key}
}

// PEM is the certificate as a file has it.
func (c *Cert) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.DER})
}

// KeyPEM is the key as a file has it.
func (c *Cert) KeyPEM(t testing.TB) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(c.Key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// Revoke makes the list of the certificates that ca takes back.
func (ca *Cert) Revoke(t testing.TB, cs ...*Cert) []byte {
	t.Helper()
	l := &x509.RevocationList{
		Number: big.NewInt(serial.Add(1)), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour),
	}
	for _, c := range cs {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now().Add(-time.Minute)})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, ca.Certificate, ca.Key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der})
}

// Dir makes a folder with the files of an authority and of certificates, under the names that
// QEMU gives them: server and client may be nil.
func Dir(t testing.TB, ca, server, client *Cert) string {
	t.Helper()
	dir := t.TempDir()
	Write(t, dir, "ca-cert.pem", ca.PEM())
	for name, c := range map[string]*Cert{"server": server, "client": client} {
		if c != nil {
			Write(t, dir, name+"-cert.pem", c.PEM())
			Write(t, dir, name+"-key.pem", c.KeyPEM(t))
		}
	}
	return dir
}

// Write writes a file.
func Write(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	must(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
