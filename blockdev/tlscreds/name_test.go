package tlscreds

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"testing"

	"qblockd/blockdev/tlscreds/certs"
)

// oddName is a name with all that has to be marked in it.
func oddName(c *x509.Certificate) {
	c.Subject.CommonName = "a, b+c=d \"x\" <y>; #z é "
	c.Subject.OrganizationalUnit, c.Subject.SerialNumber = []string{"U1", "U2"}, "77"
	c.Subject.ExtraNames = []pkix.AttributeTypeAndValue{
		{Type: asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 1}, Value: "a@b.c"},
		{Type: asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 25}, Value: "dcx"},
		{Type: asn1.ObjectIdentifier{1, 2, 3, 4, 5}, Value: "zz"},
		{Type: asn1.ObjectIdentifier{2, 5, 4, 12}, Value: "#title"},
		{Type: asn1.ObjectIdentifier{2, 5, 4, 4}, Value: " sur "},
	}
}

// TestNames: names are written as QEMU's log shows them.
func TestNames(t *testing.T) {
	ca := certs.CA(t)
	for want, change := range map[string]certs.Change{
		certs.ClientSubject: func(*x509.Certificate) {},
		`C=GB,ST=London,L=London,O=Example Home,OU=U1+OU=U2,CN=a\, b\+c=d \"x\" \<y\>\; #z é\ ,serialNumber=77,` +
			`EMAIL=#0c056140622e63,DC=#1303646378,1.2.3.4.5=#13027a7a,title=\#title,surName=\ sur\ `: oddName,
		`CN=#0c03610062`: func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "a\x00b"} },
	} {
		if got, err := distinguishedName(ca.Client(t, change).RawSubject); err != nil || got != want {
			t.Errorf("%s %v, want %s", got, err, want)
		}
	}
}

func FuzzName(f *testing.F) {
	ca := certs.CA(f)
	f.Add(ca.RawSubject)
	f.Add(ca.Client(f, oddName).RawSubject)
	f.Fuzz(func(t *testing.T, der []byte) { _, _ = distinguishedName(der) })
}
