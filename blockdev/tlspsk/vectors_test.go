package tlspsk

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"strings"
	"testing"
)

// The values of RFC 8448, 4: a handshake that resumes another one by a key, which is that of
// external keys but for one label.

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func same(t *testing.T, what string, got []byte, want string) {
	t.Helper()
	if !bytes.Equal(got, unhex(t, want)) {
		t.Errorf("%s is %x, want %s", what, got, want)
	}
}

const (
	rfcPSK  = "4ecd0eb6ec3b4d87f5d6028f922ca4c5851a277fd41311c9e62d2c9492e1c4f3"
	rfcHead = "010001fc03031bc3ceb6bbe39cff938355b5a50adb6db21b7a6af649d7b4bc419d7876487d95000006130113031302010001cd00" +
		"00000b0009000006736572766572ff01000100000a00140012001d00170018001901000101010201030104003300260024001d00" +
		"20e4ffb68ac05f8d96c99da26698346c6be16482badddafe051a66b4f18d668f0b002a0000002b0003020304000d0020001e0403" +
		"05030603020308040805080604010501060102010402050206020202002d00020101001c0002400100150057"
	rfcPadding = 0x57 // zeroes
	rfcTail    = "002900dd00b800b22c035d829359ee5ff7af4ec900000000262a6494dc486d2c8a34cb33fa90bf1b0070ad3c498883c9367c09a2" +
		"be785abc55cd226097a3a982117283f82a03a143efd3ff5dd36d64e861be7fd61d2827db279cce145077d454a3664d4e6da4d29e" +
		"e03725a6a4dafcd0fc67d2aea70529513e3da2677fa5906c5b3f7d8f92f228bda40dda721470f9fbf297b5aea617646fac5c0327" +
		"2e970727c621a79141ef5f7de6505e5bfbc388e93343694093934ae4d357fad6aacb"
	rfcBinders     = "0021203add4fb2d8fdf822a0ca3cf7678ef5e88dae990141c5924d57bb6fa31b9e5f9d"
	rfcServerHello = "0200005c03033ccfd2dec890222763472ae8136777c9d7358777bb66e91ea5122495f559ea2d00130100003400290002000000330024" +
		"001d0020121761ee42c333e1b9e77b60dd57c2053cd94512ab47f115e86eff50942cea31002b00020304"
	rfcExtensions = "080000280026000a00140012001d00170018001901000101010201030104001c0002400100000000002a0000"
	rfcFinished   = "1400002048d3e0e1b3d907c6acff145e16090388c77b05c050b634ab1a88bbd0dd1a34b2"
	rfcFlight     = "1703030061dc48237b4b879f50d0d4d262ea8b4716eb40ddc1eb957e11126e8a7149c2d012d37a7115957e64ce30008b9e0323f2c05a9" +
		"c1c77b4f37849a695ab255060a33fee770ca95cb8486bfd0843b87024865ca35cc41c4e515c64dcb1369f98635bc7a5"
	rfcEarlyEnd       = "05000000"
	rfcClientFinished = "140000207230a9c952c25cd6138fc5e6628308c41c5335dd81b9f96bcea50fd32bda416d"
	rfcClientFlight   = "170303003500f8b467d14cf22a4b3f0b6ae0d8e6cc8d08e0db3515ef5c2bdf1922eafbb70009964716d834fb70c3d2a56c5b1f5f" +
		"6bdba6c333cf"
	rfcClientData = "1703030043b1cebce242aa201be9ae5e1cb2a9aa4b33d4e866af1edb068919237741aa031d7a74d491c99b9d4e232b74206bc6f" +
		"baa04fe78be44a9b4f54320a17eb76992afac3103"
	rfcClientAlert = "17030300130facce3246bdfc6369838d6a82ae6de5d422dc"
)

var rfcPrefix = rfcHead + strings.Repeat("00", rfcPadding) + rfcTail

func TestSchedule(t *testing.T) {
	s := newSchedule(crypto.SHA256, unhex(t, rfcPSK))
	same(t, "the early secret", s.secret, "9b2188e9b2fc6d64d71dc329900e20bb41915000f678aa839cbb797cb7d8332c")
	same(t, "the hash for the binder", sum(crypto.SHA256, unhex(t, rfcPrefix)),
		"63224b2e4573f2d3454ca84b9d009a04f6be9e05711a8396473aefa01e924a14")
	same(t, "the binder", s.binder("res binder", sum(crypto.SHA256, unhex(t, rfcPrefix))), rfcBinders[6:])

	tr := transcript{hash: crypto.SHA256}
	tr.add(unhex(t, rfcPrefix+rfcBinders))
	tr.add(unhex(t, rfcServerHello))
	s.advance(unhex(t, "f44194756ff9ec9d25180635d66ea6824c6ab3bf179977be37f723570e7ccb2e"))
	same(t, "the secret of the handshake", s.secret, "005cb112fd8eb4ccc623bb88a07c64b3ede1605363fc7d0df8c7ce4ff0fb4ae6")
	client, server := s.derive(labelClientHandshake, tr.sum()), s.derive(labelServerHandshake, tr.sum())
	same(t, "the client's", client, "2faac08f851d35fea3604fcb4de82dc62c9b164a70974d0462e27f1ab278700f")
	same(t, "the server's", server, "fe927ae271312e8bf0275b581c54eef020450dc4ecffaa05a1a35d27518e7803")

	tr.add(unhex(t, rfcExtensions))
	same(t, "the server's proof", finishedMessage(finished(crypto.SHA256, server, tr.sum())), rfcFinished)
	tr.add(unhex(t, rfcFinished))
	s.advance(nil)
	same(t, "the master secret", s.secret, "e2d32d4ed66dd37897a0e80c84107503ce58bf8aad4cb55a5002d77ecb890ece")
	same(t, "the client's for data", s.derive(labelClientData, tr.sum()),
		"2abbf2b8e381d23dbebe1dd2a7d16a8bf484cb4950d23fb7fb7fa8547062d9a1")
	same(t, "the server's for data", s.derive(labelServerData, tr.sum()),
		"cc21f1bf8feb7dd5fa505bd9c4b468a9984d554a993dc49e6d285598fb672691")
	tr.add(unhex(t, rfcEarlyEnd))
	same(t, "the client's proof", finishedMessage(finished(crypto.SHA256, client, tr.sum())), rfcClientFinished)
}

// TestRecords makes and opens the records of the RFC.
func TestRecords(t *testing.T) {
	data := make([]byte, 50)
	for i := range data {
		data[i] = byte(i)
	}
	for _, c := range []struct {
		name, secret string
		seq          uint64
		typ          byte
		plain        []byte
		record       string
	}{
		{"server's flight", "fe927ae271312e8bf0275b581c54eef020450dc4ecffaa05a1a35d27518e7803", 0, recordHandshake,
			unhex(t, rfcExtensions+rfcFinished), rfcFlight},
		{"client's flight", "2faac08f851d35fea3604fcb4de82dc62c9b164a70974d0462e27f1ab278700f", 0, recordHandshake,
			unhex(t, rfcClientFinished), rfcClientFlight},
		{"data", "2abbf2b8e381d23dbebe1dd2a7d16a8bf484cb4950d23fb7fb7fa8547062d9a1", 0, recordData, data, rfcClientData},
		{"alert", "2abbf2b8e381d23dbebe1dd2a7d16a8bf484cb4950d23fb7fb7fa8547062d9a1", 1, recordAlert, []byte{1, 0}, rfcClientAlert},
	} {
		t.Run(c.name, func(t *testing.T) {
			var out, in half
			out.set(suites[0], unhex(t, c.secret))
			in.set(suites[0], unhex(t, c.secret))
			out.seq, in.seq = c.seq, c.seq
			same(t, "the record", out.seal(c.typ, append(make([]byte, headerLen), c.plain...)), c.record)
			typ, plain, err := in.open(unhex(t, c.record))
			if err != nil || typ != c.typ || !bytes.Equal(plain, c.plain) {
				t.Errorf("the record has %x of type %d, %v", plain, typ, err)
			}
		})
	}
}

// TestParseHellos reads the two hellos of the RFC.
func TestParseHellos(t *testing.T) {
	h, err := parseClientHello(unhex(t, rfcPrefix+rfcBinders))
	if err != nil {
		t.Fatal(err)
	}
	if !h.early || !h.offers13() || len(h.shares) != 1 || h.shares[0].group != groups[0].id || len(h.identities) != 1 ||
		h.unbound != len(rfcPrefix)/2 || !bytes.Equal(h.modes, []byte{pskDHE}) || len(h.suites) != 3 {
		t.Errorf("the client's: %+v", h)
	}
	same(t, "the binder", h.identities[0].binder, rfcBinders[6:])
	s, err := parseServerHello(unhex(t, rfcServerHello))
	if err != nil {
		t.Fatal(err)
	}
	if s.version != version13 || s.suite != suites[0].id || !s.hasKey || s.identity != 0 || s.retry() || s.unasked {
		t.Errorf("the server's: %+v", s)
	}
	same(t, "the share", s.share.key, "121761ee42c333e1b9e77b60dd57c2053cd94512ab47f115e86eff50942cea31")
}
