package object

import (
	"qblockd/blockdev/crypto"
	"qblockd/blockdev/tlscreds"
	"qblockd/schema/types"
	"qblockd/schema/value"
)

// certificates is a tls-creds-x509.
type certificates struct {
	p types.TlsCredsX509Properties
	*tlscreds.X509
}

func (c *certificates) typ() string { return "tls-creds-x509" }

// complete reads the files. It blocks as long as they do.
func (c *certificates) complete(r *Registry) (err error) {
	var password func() (*crypto.Key, error)
	if c.p.Passwordid != nil {
		password = func() (*crypto.Key, error) { return r.secretData(*c.p.Passwordid) }
	}
	c.X509, err = tlscreds.NewX509(&c.p, password)
	return err
}

func (c *certificates) get(property string) (value.Value, error) {
	switch property {
	case "endpoint":
		return string(types.Or(c.p.Endpoint, types.QCryptoTLSCredsEndpointClient)), nil
	case "dir":
		return types.Or(c.p.Dir, ""), nil
	case "verify-peer":
		return types.Or(c.p.VerifyPeer, true), nil
	case "priority":
		return types.Or(c.p.Priority, ""), nil
	case "sanity-check":
		return types.Or(c.p.SanityCheck, true), nil
	case "passwordid":
		return types.Or(c.p.Passwordid, ""), nil
	}
	return true, nil // loaded
}

// presharedKeys is a tls-creds-psk.
type presharedKeys struct {
	p types.TlsCredsPskProperties
	*tlscreds.PSK
}

func (k *presharedKeys) typ() string { return "tls-creds-psk" }

// complete reads the file. It blocks as long as that does.
func (k *presharedKeys) complete(*Registry) (err error) {
	k.PSK, err = tlscreds.NewPSK(&k.p)
	return err
}

func (k *presharedKeys) get(property string) (value.Value, error) {
	switch property {
	case "endpoint":
		return string(types.Or(k.p.Endpoint, types.QCryptoTLSCredsEndpointClient)), nil
	case "dir":
		return types.Or(k.p.Dir, ""), nil
	case "verify-peer":
		return types.Or(k.p.VerifyPeer, true), nil
	case "priority":
		return types.Or(k.p.Priority, ""), nil
	case "username":
		return types.Or(k.p.Username, ""), nil
	}
	return true, nil // loaded
}

// set changes nothing: the keys are what they are.
func (k *presharedKeys) set(string, value.Value) error { return errReadOnly }

// retire: those who use the credentials go on with them.
func (k *presharedKeys) retire() bool { return true }

// set changes nothing: the files have been read by then.
func (c *certificates) set(string, value.Value) error { return errReadOnly }

// retire: those who use the credentials go on with them.
func (c *certificates) retire() bool { return true }
