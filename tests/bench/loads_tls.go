package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"

	"qblockd/blockdev/nbdwire"
	"qblockd/blockdev/tlscreds"
	"qblockd/schema/types"
)

// tlsLoads: a raw image in memory under TLS, by certificates ("x509", of both ends) or keys
// ("psk"). The client is tlscreds for all servers.
func tlsLoads(b *bench, kind string) *group {
	var creds tlscreds.Creds
	path := func() string { return filepath.Join(b.shm, "raw") }
	up := map[string]*proc{}
	g := &group{name: "nbd tls " + kind, sides: []string{us, qsd, qsd10}}
	g.ready = func() (err error) {
		if creds, err = makeCreds(b.shm, kind); err != nil {
			return err
		}
		return fillRaw(path(), b.size)
	}
	g.setUp = func(side string) error {
		p, err := b.daemon(side, 0, "--blockdev", "driver=file,node-name=n,locking=off,filename="+path(),
			"--object", "tls-creds-"+kind+",id=t,endpoint=server,dir="+b.shm)
		if err != nil {
			return err
		}
		up[side] = p
		for _, c := range []struct {
			command string
			args    object
		}{
			{"nbd-server-stop", nil},
			{"nbd-server-start", object{"tls-creds": "t", "addr": object{"type": "unix", "data": object{"path": p.nbd}}}},
			{"block-export-add", object{"type": "nbd", "id": "e", "node-name": "n", "name": exportName, "writable": true}},
		} {
			if _, err := p.q.do(c.command, c.args); err != nil {
				return err
			}
		}
		return nil
	}
	g.down = func() { os.Remove(path()) }
	for _, l := range []nbdLoad{
		{"read 1 MiB qd8", workload{bs: mib, qd: 8, conns: 1, verify: true}},
		{"write 1 MiB qd8", workload{bs: mib, qd: 8, conns: 1, write: true}},
		{"randread 4 KiB qd16", workload{bs: 4096, qd: 16, conns: 1, random: true, verify: true}},
		{"randwrite 4 KiB qd16", workload{bs: 4096, qd: 16, conns: 1, random: true, write: true}},
	} {
		g.loads = append(g.loads, tlsLoad(b, l, up, &creds))
	}
	return g
}

// tlsLoad measures what goes through in a second, and for a second of the server's processor time:
// that counts where the client is as busy as the server.
func tlsLoad(b *bench, l nbdLoad, up map[string]*proc, creds *tlscreds.Creds) load {
	unit, scale := "MB/s", float64(l.bs)/1e6
	if l.bs < 64<<10 {
		unit, scale = "IOPS", 1
	}
	metrics := []metric{{l.name, unit, false}, {l.name + ", processor time", unit, false}}
	return load{name: l.name, metrics: metrics, run: func(side string) ([]float64, error) {
		before, err := up[side].cpu()
		if err != nil {
			return nil, err
		}
		begin := time.Now()
		n, err := driveBy(func() (*nbdConn, error) { return dialTLS(up[side].nbd, *creds) }, l.workload, b.secs)
		took := time.Since(begin).Seconds()
		if err != nil {
			return nil, err
		}
		after, err := up[side].cpu()
		return []float64{n * scale, n * scale * took / (after - before)}, err
	}}
}

// dialTLS is dialNBD under TLS.
func dialTLS(path string, creds tlscreds.Creds) (*nbdConn, error) {
	nc, err := net.Dial("unix", path)
	if err != nil {
		return nil, err
	}
	_ = nc.SetDeadline(time.Now().Add(time.Minute))
	c := &nbdConn{fd: -1, in: make([]byte, 256<<10)}
	if err = startTLS(nc); err == nil {
		c.under, err = creds.Client(nc, "localhost")
	}
	if err != nil {
		nc.Close()
		return nil, err
	}
	if err := c.choose(); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// startTLS asks a server for TLS.
func startTLS(nc net.Conn) error {
	if _, err := io.CopyN(io.Discard, nc, 18); err != nil {
		return err
	}
	ask := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	if _, err := nc.Write(nbdwire.AppendOption(ask, nbdwire.OptStartTLS, nil)); err != nil {
		return err
	}
	h := make([]byte, nbdwire.OptReplySize)
	if _, err := io.ReadFull(nc, h); err != nil {
		return err
	}
	r, err := nbdwire.ParseOptReply(h)
	if err == nil && r.Type != nbdwire.RepAck {
		err = fmt.Errorf("TLS is answered by %#x", r.Type)
	}
	return err
}

// makeCreds makes the files of credentials of a kind, and a client's.
func makeCreds(dir, kind string) (tlscreds.Creds, error) {
	end := types.QCryptoTLSCredsEndpointClient
	if kind == "psk" {
		key := make([]byte, 32)
		_, _ = rand.Read(key)
		if err := os.WriteFile(filepath.Join(dir, "keys.psk"), []byte("qemu:"+hex.EncodeToString(key)+"\n"), 0o600); err != nil {
			return nil, err
		}
		p := &types.TlsCredsPskProperties{}
		p.Dir, p.Endpoint = &dir, &end
		return tlscreds.NewPSK(p)
	}
	if err := makeCertificates(dir); err != nil {
		return nil, err
	}
	p := &types.TlsCredsX509Properties{}
	p.Dir, p.Endpoint = &dir, &end
	return tlscreds.NewX509(p, nil)
}

// makeCertificates writes those of an authority, a server and a client, on P-256.
func makeCertificates(dir string) error {
	var ca *x509.Certificate
	var caKey *ecdsa.PrivateKey
	for i, name := range []string{"ca", "server", "client"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			return err
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(i + 1)), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		}
		if name == "ca" {
			c.IsCA, c.KeyUsage, c.DNSNames = true, x509.KeyUsageCertSign, nil
			ca, caKey = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, key.Public(), caKey)
		if err != nil {
			return err
		}
		secret, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return err
		}
		err = errors.Join(writePEM(filepath.Join(dir, name+"-cert.pem"), "CERTIFICATE", der),
			writePEM(filepath.Join(dir, name+"-key.pem"), "PRIVATE KEY", secret))
		if err != nil {
			return err
		}
	}
	return nil
}

func writePEM(path, typ string, der []byte) error {
	return os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}), 0o600)
}
