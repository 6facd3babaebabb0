package tlscreds

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	qcrypto "qblockd/blockdev/crypto"
	"qblockd/blockdev/tlscreds/certs"
	"qblockd/schema/types"
)

func ptr[T any](v T) *T { return &v }

// creds makes credentials for an end of the files in dir.
func creds(t *testing.T, dir string, end types.QCryptoTLSCredsEndpoint) *X509 {
	t.Helper()
	c, err := NewX509(&types.TlsCredsX509Properties{Dir: &dir, Endpoint: &end}, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const (
	server = types.QCryptoTLSCredsEndpointServer
	client = types.QCryptoTLSCredsEndpointClient
)

func usage(u x509.KeyUsage) certs.Change { return func(c *x509.Certificate) { c.KeyUsage = u } }

// criticalPurpose makes oid the only use of a certificate.
func criticalPurpose(oid ...int) certs.Change {
	return func(c *x509.Certificate) {
		v, _ := asn1.Marshal([]asn1.ObjectIdentifier{oid})
		c.ExtKeyUsage = nil
		c.ExtraExtensions = []pkix.Extension{{Id: oidPurpose, Critical: true, Value: v}}
	}
}

// sanityCase is a folder of files, and what is said of it; DIR stands for the folder, "" for no
// error.
type sanityCase struct {
	dir  func(t *testing.T) string
	want string
}

// sanityMaker makes folders that are wrong in one way.
type sanityMaker struct {
	t  *testing.T
	ca *certs.Cert
}

func (m sanityMaker) files(ca, own *certs.Cert) func(t *testing.T) string {
	return func(t *testing.T) string { return certs.Dir(t, ca, own, nil) }
}

func (m sanityMaker) own(changes ...certs.Change) func(t *testing.T) string {
	return m.files(m.ca, m.ca.Server(m.t, changes...))
}

func (m sanityMaker) authority(changes ...certs.Change) func(t *testing.T) string {
	a := certs.CA(m.t, changes...)
	return m.files(a, a.Server(m.t))
}

func (m sanityMaker) without(name string) func(t *testing.T) string {
	return func(t *testing.T) string {
		dir := m.own()(t)
		_ = os.Remove(filepath.Join(dir, name))
		return dir
	}
}

func (m sanityMaker) with(name string, data []byte) func(t *testing.T) string {
	return func(t *testing.T) string {
		dir := m.own()(t)
		certs.Write(t, dir, name, data)
		return dir
	}
}

func expired(c *x509.Certificate)       { c.NotAfter = time.Now().Add(-time.Minute) }
func early(c *x509.Certificate)         { c.NotBefore = time.Now().Add(time.Minute) }
func notCA(c *x509.Certificate)         { c.IsCA = false }
func isCA(c *x509.Certificate)          { c.IsCA = true }
func noConstraints(c *x509.Certificate) { c.BasicConstraintsValid, c.IsCA = false, false }

func sanityCases(t *testing.T) map[string]sanityCase {
	m := sanityMaker{t, certs.CA(t)}
	garbage := []byte("-----BEGIN nothing")
	return map[string]sanityCase{
		"sound":           {m.own(), ""},
		"no CA":           {m.without("ca-cert.pem"), "Unable to access credentials DIR/ca-cert.pem: No such file or directory"},
		"no certificate":  {m.without("server-cert.pem"), "Unable to access credentials DIR/server-cert.pem: No such file or directory"},
		"no key":          {m.without("server-key.pem"), "Unable to access credentials DIR/server-key.pem: No such file or directory"},
		"CA expired":      {m.authority(expired), "The CA certificate DIR/ca-cert.pem has expired"},
		"CA early":        {m.authority(early), "The CA certificate DIR/ca-cert.pem is not yet active"},
		"CA is none":      {m.authority(notCA), "The certificate DIR/ca-cert.pem basic constraints do not show a CA"},
		"CA does not say": {m.authority(noConstraints), "The certificate DIR/ca-cert.pem is missing basic constraints for a CA"},
		"CA signs not":    {m.authority(usage(x509.KeyUsageDigitalSignature)), "Certificate DIR/ca-cert.pem usage does not permit certificate signing"},
		"CA any usage":    {m.authority(usage(0)), ""},
		"expired":         {m.own(expired), "The server certificate DIR/server-cert.pem has expired"},
		"early":           {m.own(early), "The server certificate DIR/server-cert.pem is not yet active"},
		"is a CA":         {m.own(isCA), "The certificate DIR/server-cert.pem basic constraints show a CA, but we need one for a server"},
		"no constraints":  {m.own(noConstraints), ""},
		"no signature":    {m.own(usage(x509.KeyUsageKeyEncipherment)), "Certificate DIR/server-cert.pem usage does not permit digital signature"},
		"no encryption":   {m.own(usage(x509.KeyUsageDigitalSignature)), ""},
		"any usage":       {m.own(usage(0)), ""},
		"for clients":     {m.own(criticalPurpose(1, 3, 6, 1, 5, 5, 7, 3, 2)), "Certificate DIR/server-cert.pem purpose does not allow use with a TLS server"},
		"for anything":    {m.own(criticalPurpose(2, 5, 29, 37, 0)), ""},
		"foreign": {m.files(m.ca, certs.CA(t).Server(t)), "Our own certificate DIR/server-cert.pem failed validation against " +
			"DIR/ca-cert.pem: The certificate hasn't got a known issuer"},
		"another's key": {m.with("server-key.pem", m.ca.Server(t).KeyPEM(t)),
			"Cannot load certificate 'DIR/server-cert.pem' & key 'DIR/server-key.pem': The certificate and the given key do not match."},
		"garbage for a CA":          {m.with("ca-cert.pem", garbage), "Unable to import CA certificate list DIR/ca-cert.pem"},
		"garbage for a certificate": {m.with("server-cert.pem", garbage), "Unable to import server certificate DIR/server-cert.pem: Base64 unexpected header error."},
		"garbage for a key": {m.with("server-key.pem", garbage),
			"Cannot load certificate 'DIR/server-cert.pem' & key 'DIR/server-key.pem': The requested data were not available."},
		"garbage for a list": {m.with("ca-crl.pem", garbage), "Cannot load CRL 'DIR/ca-crl.pem': Base64 decoding error."},
		"another's list": {m.with("ca-crl.pem", certs.CA(t).Revoke(t)),
			"Cannot load CRL 'DIR/ca-crl.pem': The list is not signed by an authority in ca-cert.pem"},
		"a folder for a key": {func(t *testing.T) string {
			dir := m.without("server-key.pem")(t)
			_ = os.Mkdir(filepath.Join(dir, "server-key.pem"), 0o700)
			return dir
		}, "Unable to access credentials DIR/server-key.pem: not a file of credentials"},
	}
}

// TestSanity: certificates that cannot work are refused in QEMU's words.
func TestSanity(t *testing.T) {
	for name, c := range sanityCases(t) {
		t.Run(name, func(t *testing.T) {
			dir := c.dir(t)
			_, err := NewX509(&types.TlsCredsX509Properties{Dir: &dir, Endpoint: ptr(server)}, nil)
			got := ""
			if err != nil {
				got = strings.ReplaceAll(err.Error(), dir, "DIR")
			}
			if got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// TestNoSanity: what is wrong may show later on if it is to; a client needs no certificate.
func TestNoSanity(t *testing.T) {
	ca := certs.CA(t)
	dir := certs.Dir(t, ca, nil, certs.CA(t).Client(t))
	p := types.TlsCredsX509Properties{Dir: &dir}
	if _, err := NewX509(&p, nil); err == nil {
		t.Error("a foreign certificate is good")
	}
	p.SanityCheck = ptr(false)
	if _, err := NewX509(&p, nil); err != nil {
		t.Error(err)
	}
	bare := certs.Dir(t, ca, nil, nil)
	c, err := NewX509(&types.TlsCredsX509Properties{Dir: &bare}, nil)
	if err != nil || c.Endpoint() != client || !c.KnowsPeer() {
		t.Error(c, err)
	}
	if _, err := NewX509(&types.TlsCredsX509Properties{}, nil); err == nil || err.Error() != "Missing 'dir' property value" {
		t.Error(err)
	}
}

func given(password string) func() (*qcrypto.Key, error) {
	return func() (*qcrypto.Key, error) { return qcrypto.CopyKey([]byte(password)) }
}

// TestPassword: keys that a password protects, as openssl makes them.
func TestPassword(t *testing.T) {
	dir := "testdata/encrypted"
	for name, c := range map[string]struct {
		key      string
		password func() (*qcrypto.Key, error)
		want     string
	}{
		"AES":            {"aes.pem", given("123456"), ""},
		"AES-128, SHA-1": {"aes128sha1.pem", given("123456"), ""},
		"3DES":           {"des3.pem", given("123456"), ""},
		"old":            {"old.pem", given("123456"), ""},
		"wrong":          {"aes.pem", given("123457"), "Decryption has failed."},
		"old, wrong":     {"old.pem", given("123457"), "Decryption has failed."},
		"none":           {"aes.pem", nil, "Decryption has failed."},
		"secret missing": {"aes.pem", func() (*qcrypto.Key, error) { return nil, errors.New("No secret with id 's'") },
			"No secret with id 's'"},
	} {
		t.Run(name, func(t *testing.T) {
			tmp := t.TempDir()
			for from, to := range map[string]string{"cert.pem": "server-cert.pem", "ca.pem": "ca-cert.pem", c.key: "server-key.pem"} {
				data, err := os.ReadFile(filepath.Join(dir, from))
				if err != nil {
					t.Fatal(err)
				}
				certs.Write(t, tmp, to, data)
			}
			p := types.TlsCredsX509Properties{Dir: &tmp, Endpoint: ptr(server), SanityCheck: ptr(false)}
			_, err := NewX509(&p, c.password)
			if got := errText(err); !strings.HasSuffix(got, c.want) || (got == "") != (c.want == "") {
				t.Errorf("%q, want %q", got, c.want)
			}
			if strings.Contains(errText(err), "12345") {
				t.Error("the password shows")
			}
		})
	}
}

func errText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func FuzzKey(f *testing.F) {
	for _, name := range []string{"aes.pem", "des3.pem", "old.pem", "plain.pem"} {
		data, err := os.ReadFile(filepath.Join("testdata/encrypted", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, file []byte) {
		if der, err := parseKey(file, []byte("123456")); err == nil {
			_, _ = signer(der)
		}
		_, _ = certificates(file)
	})
}

// TestPriority: what can be kept to is taken, all else refused.
func TestPriority(t *testing.T) {
	for s, want := range map[string]string{
		"NORMAL":                             "0303 0304",
		"SECURE128":                          "0303 0304",
		"NORMAL:-VERS-TLS1.3":                "0303 0303",
		"NORMAL:-VERS-TLS1.2":                "0304 0304",
		"NORMAL:-VERS-ALL:+VERS-TLS1.3":      "0304 0304",
		"NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2":  "0303 0303",
		"NORMAL:-VERS-TLS1.0:-VERS-TLS1.1":   "0303 0304",
		"NORMAL:!VERS-TLS1.3:+VERS-TLS1.3":   "0303 0304",
		"":                                   "Cannot set TLS session priority : '' is not supported, use NORMAL",
		"SECURE256":                          "Cannot set TLS session priority SECURE256: 'SECURE256' is not supported, use NORMAL",
		"NORMAL:-VERS-ALL":                   "Cannot set TLS session priority NORMAL:-VERS-ALL: no version of TLS is left",
		"NORMAL:-VERS-TLS1.2:-VERS-TLS1.3":   "no version of TLS is left",
		"NORMAL:-VERS-ALL:+VERS-TLS1.1":      "'+VERS-TLS1.1' is not supported",
		"NORMAL:+AES-256-GCM":                "'+AES-256-GCM' is not supported",
		"NORMAL:%SERVER_PRECEDENCE":          "'%SERVER_PRECEDENCE' is not supported",
		"NORMAL:":                            "'' is not supported",
		"NORMAL:VERS-TLS1.3":                 "'VERS-TLS1.3' is not supported",
		"NORMAL:-VERS-ALL:+VERS-TLS1.2:+PSK": "'+PSK' is not supported",
	} {
		low, high, err := ParsePriority(s)
		got := errText(err)
		if err == nil {
			got = fmtVersions(low, high)
		}
		if !strings.Contains(got, want) {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

func fmtVersions(low, high uint16) string { return fmt.Sprintf("%04x %04x", low, high) }
