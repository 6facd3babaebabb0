package tlscreds

import (
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	qcrypto "qblockd/blockdev/crypto"
	"qblockd/graph/blk"
	"qblockd/schema/types"
)

// NewX509 reads the certificates and keys that p names. password gives a copy of that of the key;
// nil: there is none. Source of the names of files and of what is checked: QEMU's documentation of
// TLS.
func NewX509(p *types.TlsCredsX509Properties, password func() (*qcrypto.Key, error)) (*X509, error) {
	low, high, err := ParsePriority(cmp.Or(types.Or(p.Priority, ""), "NORMAL"))
	if err != nil {
		return nil, err
	}
	if p.Dir == nil {
		return nil, errors.New("Missing 'dir' property value")
	}
	c := &X509{end: types.Or(p.Endpoint, types.QCryptoTLSCredsEndpointClient), verify: types.Or(p.VerifyPeer, true)}
	l := loader{dir: *p.Dir, end: c.end, password: password}
	own, err := l.load(types.Or(p.SanityCheck, true))
	if err != nil {
		return nil, err
	}
	c.ca = l.ca
	c.configure(low, high, own)
	return c, nil
}

// loader reads the files of a folder.
type loader struct {
	dir      string
	end      types.QCryptoTLSCredsEndpoint
	password func() (*qcrypto.Key, error)
	ca       authorities
}

// maxFile is how long a file may be, in bytes.
const maxFile = 16 << 20

// read is the content of a file, nil if it need not be there and is not.
func (l *loader) read(name string, needed bool) (path string, data []byte, err error) {
	path = l.dir + "/" + name
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist) && !needed:
		return path, nil, nil
	case err == nil && (!st.Mode().IsRegular() || st.Size() > maxFile):
		err = errors.New("not a file of credentials")
		return path, nil, fmt.Errorf("Unable to access credentials %s: %w", path, err)
	case err == nil:
		data, err = os.ReadFile(path)
	}
	if err != nil {
		return path, nil, blk.Errnof(err, "Unable to access credentials %s", path)
	}
	if data == nil {
		data = []byte{}
	}
	return path, data, nil
}

// load reads everything and returns our own certificate with its key, nil if there is none.
func (l *loader) load(check bool) (*tls.Certificate, error) {
	server := l.end == types.QCryptoTLSCredsEndpointServer
	caPath, caFile, err := l.read("ca-cert.pem", true)
	if err != nil {
		return nil, err
	}
	crlPath, crlFile, err := l.read("ca-crl.pem", false)
	if err != nil {
		return nil, err
	}
	certPath, certFile, err := l.read(string(l.end)+"-cert.pem", server)
	if err != nil {
		return nil, err
	}
	keyPath, keyFile, err := l.read(string(l.end)+"-key.pem", server)
	defer clear(keyFile)
	if err != nil {
		return nil, err
	}
	var certs []*x509.Certificate
	if certFile != nil {
		if certs, err = certificates(certFile); err != nil {
			return nil, fmt.Errorf("Unable to import %s certificate %s: %w", l.end, certPath, err)
		}
	}
	if l.ca.certs, err = certificates(caFile); err != nil {
		return nil, fmt.Errorf("Unable to import CA certificate list %s", caPath)
	}
	l.ca.roots = x509.NewCertPool()
	for _, c := range l.ca.certs {
		l.ca.roots.AddCert(c)
	}
	if check {
		if err := l.sane(certs, certPath, caPath); err != nil {
			return nil, err
		}
	}
	if l.ca.lists, err = l.revocations(crlFile); err != nil {
		return nil, fmt.Errorf("Cannot load CRL '%s': %w", crlPath, err)
	}
	if certFile == nil || keyFile == nil {
		return nil, nil
	}
	return l.own(certs, certPath, keyFile, keyPath)
}

// certificates are those in a file.
func certificates(file []byte) (all []*x509.Certificate, err error) {
	for {
		var b *pem.Block
		if b, file = pem.Decode(file); b == nil {
			break
		}
		if b.Type != "CERTIFICATE" && b.Type != "X509 CERTIFICATE" && b.Type != "TRUSTED CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(b.Bytes)
		if err != nil {
			return nil, errors.New(strings.TrimPrefix(err.Error(), "x509: "))
		}
		all = append(all, c)
	}
	if len(all) == 0 {
		return nil, errors.New("Base64 unexpected header error.")
	}
	return all, nil
}

// revocations are the lists of certificates that authorities have taken back.
func (l *loader) revocations(file []byte) (all []*x509.RevocationList, err error) {
	for rest := file; ; {
		var b *pem.Block
		if b, rest = pem.Decode(rest); b == nil {
			break
		}
		if b.Type != "X509 CRL" {
			continue
		}
		r, err := x509.ParseRevocationList(b.Bytes)
		if err != nil {
			return nil, errors.New(strings.TrimPrefix(err.Error(), "x509: "))
		}
		if !slices.ContainsFunc(l.ca.certs, func(c *x509.Certificate) bool { return r.CheckSignatureFrom(c) == nil }) {
			return nil, errors.New("The list is not signed by an authority in ca-cert.pem")
		}
		all = append(all, r)
	}
	if file != nil && len(all) == 0 {
		return nil, errors.New("Base64 decoding error.")
	}
	return all, nil
}

// own is our certificate with its key.
func (l *loader) own(
	certs []*x509.Certificate, certPath string, keyFile []byte, keyPath string,
) (*tls.Certificate, error) {
	var password *qcrypto.Key
	var err error
	if l.password != nil {
		if password, err = l.password(); err != nil {
			return nil, err
		}
		defer password.Close()
	}
	der, err := parseKey(keyFile, password.Bytes())
	var key crypto.Signer
	if err == nil {
		key, err = signer(der)
		clear(der)
	}
	if err == nil && !key.Public().(interface{ Equal(crypto.PublicKey) bool }).Equal(certs[0].PublicKey) {
		err = errors.New("The certificate and the given key do not match.")
	}
	if err != nil {
		return nil, fmt.Errorf("Cannot load certificate '%s' & key '%s': %w", certPath, keyPath, err)
	}
	t := &tls.Certificate{PrivateKey: key, Leaf: certs[0]}
	for _, c := range certs {
		t.Certificate = append(t.Certificate, c.Raw)
	}
	return t, nil
}

// signer is the key that der has in one of the forms there are.
func signer(der []byte) (crypto.Signer, error) {
	if k, err := x509.ParsePKCS8PrivateKey(der); err == nil {
		switch k := k.(type) {
		case *rsa.PrivateKey:
			return k, nil
		case *ecdsa.PrivateKey:
			return k, nil
		case ed25519.PrivateKey:
			return k, nil
		}
	}
	if k, err := x509.ParsePKCS1PrivateKey(der); err == nil {
		return k, nil
	}
	if k, err := x509.ParseECPrivateKey(der); err == nil {
		return k, nil
	}
	return nil, errors.New("The key is of a kind that is not supported.")
}

// sane refuses certificates that cannot work.
func (l *loader) sane(own []*x509.Certificate, ownPath, caPath string) error {
	if len(own) > 0 {
		if err := l.saneOne(own[0], ownPath, string(l.end)); err != nil {
			return err
		}
	}
	for _, c := range l.ca.certs {
		if err := l.saneOne(c, caPath, "CA"); err != nil {
			return err
		}
	}
	if len(own) == 0 {
		return nil
	}
	if err := l.ca.check(own, x509.ExtKeyUsageAny); err != nil {
		return fmt.Errorf("Our own certificate %s failed validation against %s: %w", ownPath, caPath, err)
	}
	return nil
}

var (
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidPurpose  = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// critical tells whether a certificate must be used by what an extension says.
func critical(c *x509.Certificate, oid asn1.ObjectIdentifier) bool {
	for _, e := range c.Extensions {
		if e.Id.Equal(oid) {
			return e.Critical
		}
	}
	return false
}

// saneOne checks one certificate for what it is to be: CA, server or client.
func (l *loader) saneOne(c *x509.Certificate, path, what string) error {
	now := time.Now()
	switch {
	case now.After(c.NotAfter):
		return fmt.Errorf("The %s certificate %s has expired", what, path)
	case now.Before(c.NotBefore):
		return fmt.Errorf("The %s certificate %s is not yet active", what, path)
	}
	strict := critical(c, oidKeyUsage) && c.KeyUsage != 0
	if what == "CA" {
		switch {
		case !c.BasicConstraintsValid:
			return fmt.Errorf("The certificate %s is missing basic constraints for a CA", path)
		case !c.IsCA:
			return fmt.Errorf("The certificate %s basic constraints do not show a CA", path)
		case strict && c.KeyUsage&x509.KeyUsageCertSign == 0:
			return fmt.Errorf("Certificate %s usage does not permit certificate signing", path)
		}
		return nil
	}
	switch {
	case c.BasicConstraintsValid && c.IsCA:
		return fmt.Errorf("The certificate %s basic constraints show a CA, but we need one for a %s", path, what)
	case strict && c.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return fmt.Errorf("Certificate %s usage does not permit digital signature", path)
	case critical(c, oidPurpose) && !slices.Contains(c.ExtKeyUsage, use(l.end)) &&
		!slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageAny):
		return fmt.Errorf("Certificate %s purpose does not allow use with a TLS %s", path, what)
	}
	return nil
}
