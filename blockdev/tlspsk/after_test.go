package tlspsk

import "testing"

// after is what one that is connected may get.
var after = []struct {
	name string
	send func(o *output)
	want Alert
}{
	{"unknown type", func(o *output) { o.add(24, []byte("x")) }, UnexpectedMessage},
	{"ChangeCipherSpec", func(o *output) { putRecord(o, o.seal(recordChangeCipherSpec, make([]byte, headerLen+1))) },
		UnexpectedMessage},
	{"no type", func(o *output) { putRecord(o, o.seal(0, make([]byte, headerLen+10))) }, UnexpectedMessage},
	{"in the clear", func(o *output) { putRecord(o, record(recordHandshake, []byte{typeKeyUpdate, 0, 0, 1, 0})) }, UnexpectedMessage},
	{"alert in the clear", func(o *output) { putRecord(o, record(recordAlert, []byte{1, 0})) }, UnexpectedMessage},
	{"too long", func(o *output) { putRecord(o, o.seal(recordData, make([]byte, headerLen+maxPlain+1))) }, RecordOverflow},
	{"far too long", func(o *output) { putRecord(o, []byte{recordData, 3, 3, 0x41, 1}) }, RecordOverflow},
	{"too short", func(o *output) { putRecord(o, record(recordData, make([]byte, tagLen-1))) }, BadRecordMAC},
	{"a bit", func(o *output) {
		o.add(recordData, []byte("hello"))
		o.buf.b[len(o.buf.b)-1] ^= 1
	}, BadRecordMAC},
	{"header", func(o *output) {
		o.add(recordData, []byte("hello"))
		o.buf.b[1], o.buf.b[2] = 3, 1
	}, BadRecordMAC},
	{"lost", func(o *output) {
		o.seq++
		o.add(recordData, []byte("hello"))
	}, BadRecordMAC},
	{"again", func(o *output) {
		o.seq--
		o.add(recordData, []byte("hello"))
	}, BadRecordMAC},
	{"nothing, often", func(o *output) {
		for range maxUseless + 1 {
			putRecord(o, o.seal(recordData, make([]byte, headerLen)))
		}
	}, UnexpectedMessage},
	{"keys, often", func(o *output) {
		for range maxUseless + 1 {
			o.add(recordHandshake, []byte{typeKeyUpdate, 0, 0, 1, 0})
			o.update()
		}
	}, UnexpectedMessage},
	{"key with what?", func(o *output) { o.add(recordHandshake, []byte{typeKeyUpdate, 0, 0, 1, 2}) }, IllegalParameter},
	{"key with more", func(o *output) { o.add(recordHandshake, []byte{typeKeyUpdate, 0, 0, 2, 0, 0}) }, IllegalParameter},
	{"after the key", func(o *output) { o.add(recordHandshake, []byte{typeKeyUpdate, 0, 0, 1, 0, typeKeyUpdate}) }, UnexpectedMessage},
	{"interrupted", func(o *output) {
		o.add(recordHandshake, []byte{typeKeyUpdate, 0})
		o.add(recordData, []byte("x"))
	}, UnexpectedMessage},
	{"long message", func(o *output) { o.add(recordHandshake, []byte{typeNewSessionTicket, 1, 0, 0}) }, DecodeError},
	{"another handshake", func(o *output) { o.add(recordHandshake, []byte{typeClientHello, 0, 0, 0}) }, UnexpectedMessage},
	{"certificate", func(o *output) { o.add(recordHandshake, []byte{13, 0, 0, 0}) }, UnexpectedMessage},
	{"empty piece", func(o *output) { putRecord(o, o.seal(recordHandshake, make([]byte, headerLen))) }, UnexpectedMessage},
	{"short alert", func(o *output) { o.add(recordAlert, []byte{1}) }, DecodeError},
}

func putRecord(o *output, rec []byte) {
	if o.buf == nil {
		o.take(0)
	}
	o.buf.b = append(o.buf.b, rec...)
}

func TestAfter(t *testing.T) {
	for _, x := range after {
		t.Run(x.name, func(t *testing.T) {
			client, server := connected(t, clientConfig(), serverConfig())
			pass(t, client, server, []byte("hello"))
			x.send(&server.out)
			if err := server.flushLocked(); err != nil {
				t.Fatal(err)
			}
			server.out.drop()
			_, err := client.Read(make([]byte, 100))
			if !isLocal(err, x.want) {
				t.Errorf("the client gets %v, want %v", err, x.want)
			}
			if _, again := client.Read(make([]byte, 100)); again != err {
				t.Errorf("and then %v", again)
			}
			if _, werr := client.Write([]byte("x")); werr != err {
				t.Errorf("a write gives %v", werr)
			}
			if _, err := server.Read(make([]byte, 100)); err != RemoteError(x.want) {
				t.Errorf("the server is told %v, want %v", err, x.want)
			}
		})
	}
}
