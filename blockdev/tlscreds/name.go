package tlscreds

import (
	"encoding/asn1"
	"fmt"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// attributes are the parts of names that GnuTLS has words for, by object identifier.
var attributes = map[string]string{
	"2.5.4.3": "CN", "2.5.4.4": "surName", "2.5.4.5": "serialNumber", "2.5.4.6": "C", "2.5.4.7": "L", "2.5.4.8": "ST",
	"2.5.4.9": "street", "2.5.4.10": "O", "2.5.4.11": "OU", "2.5.4.12": "title", "2.5.4.13": "description",
	"2.5.4.16": "postalAddress", "2.5.4.17": "postalCode", "2.5.4.20": "telephoneNumber", "2.5.4.41": "name",
	"2.5.4.42": "givenName", "2.5.4.43": "initials", "2.5.4.44": "generationQualifier", "2.5.4.46": "dnQualifier",
	"2.5.4.65": "pseudonym", "0.9.2342.19200300.100.1.25": "DC", "0.9.2342.19200300.100.1.1": "UID",
	"1.2.840.113549.1.9.1": "EMAIL",
}

// A name in DER: attributes in sets in a sequence.
type attribute struct {
	Type  asn1.ObjectIdentifier
	Value asn1.RawValue
}

type attributeSET []attribute

// distinguishedName writes a name as GnuTLS does for QEMU: in the order of the certificate, not
// turned round as in RFC 4514. Names that differ are written differently: what is no text is in
// hexadecimal.
func distinguishedName(der []byte) (string, error) {
	var name []attributeSET
	if rest, err := asn1.Unmarshal(der, &name); err != nil || len(rest) > 0 {
		return "", fmt.Errorf("the name in the certificate cannot be read")
	}
	var b strings.Builder
	for i, set := range name {
		for j, a := range set {
			switch {
			case j > 0:
				b.WriteByte('+')
			case i > 0:
				b.WriteByte(',')
			}
			oid := a.Type.String()
			word, known := attributes[oid]
			if !known {
				word = oid
			}
			text, ok := plainText(a.Value)
			if ascii := word == "DC" || word == "EMAIL"; !known || !ok || ascii != (a.Value.Tag == asn1.TagIA5String) {
				fmt.Fprintf(&b, "%s=#%x", word, a.Value.FullBytes)
				continue
			}
			b.WriteString(word + "=" + escaped(text))
		}
	}
	return b.String(), nil
}

// plainText is the text of a value; false if it is none.
func plainText(v asn1.RawValue) (string, bool) {
	text := ""
	if v.Class != asn1.ClassUniversal || v.IsCompound {
		return "", false
	}
	switch v.Tag {
	case asn1.TagPrintableString, asn1.TagUTF8String, asn1.TagIA5String:
		text = string(v.Bytes)
	case asn1.TagBMPString:
		if len(v.Bytes)%2 != 0 {
			return "", false
		}
		units := make([]uint16, len(v.Bytes)/2)
		for i := range units {
			units[i] = uint16(v.Bytes[2*i])<<8 | uint16(v.Bytes[2*i+1])
		}
		text = string(utf16.Decode(units))
	default:
		return "", false
	}
	return text, text != "" && utf8.ValidString(text) && !strings.ContainsRune(text, 0)
}

// escaped is a value with what has a meaning in names marked.
func escaped(s string) string {
	var b strings.Builder
	for i, c := range []byte(s) {
		switch {
		case strings.IndexByte(`,+"\<>;`, c) >= 0, c == '#' && i == 0, c == ' ' && (i == 0 || i == len(s)-1):
			b.WriteByte('\\')
		}
		b.WriteByte(c)
	}
	return b.String()
}
