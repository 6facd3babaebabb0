package vhostwire

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"
)

// parse parses what one message has on the wire.
func parse(b []byte, fds int) (h Header, m Message, err error) {
	if h, err = ParseHeader(b); err != nil {
		return h, m, err
	}
	err = m.Parse(h, b[HeaderSize:HeaderSize+int(h.Size)], fds)
	return h, m, err
}

// The bytes are those that QEMU 7.2 and libblkio send.
func TestMessages(t *testing.T) {
	for _, c := range []struct {
		m    Message
		fds  int
		wire string
	}{
		{Message{Request: GetFeatures}, 0, "010000000100000000000000"},
		{Message{Request: SetFeatures, Number: 0x175007e46}, 0, "020000000100000008000000" + "467e007501000000"},
		{Message{Request: SetVringNum, State: State{1, 128}}, 0, "080000000100000008000000" + "0100000080000000"},
		{Message{Request: SetVringKick, Number: 3}, 1, "0c0000000100000008000000" + "0300000000000000"},
		{Message{Request: SetVringKick, Number: 3 | RingNoFD}, 0, "0c0000000100000008000000" + "0301000000000000"},
		{Message{Request: SetVringAddr, Addr: Addr{2, 1, 3, 4, 5, 6}}, 0, "090000000100000028000000" + "0200000001000000" +
			"0300000000000000" + "0400000000000000" + "0500000000000000" + "0600000000000000"},
		{Message{Request: SetMemTable, Regions: []Region{{1, 2, 3, 4}}}, 1, "050000000100000028000000" + "0100000000000000" +
			"0100000000000000" + "0200000000000000" + "0300000000000000" + "0400000000000000"},
		{Message{Request: RemMemReg, Regions: []Region{{1, 2, 3, 4}}}, 0, "260000000100000028000000" + "0000000000000000" +
			"0100000000000000" + "0200000000000000" + "0300000000000000" + "0400000000000000"},
		{Message{Request: SetConfig, Config: Config{32, 0, []byte{1}}}, 0,
			"19000000010000000d000000" + "20000000" + "01000000" + "00000000" + "01"},
		{Message{Request: SetLogBase, Log: Log{1, 2}}, 1,
			"060000000100000010000000" + "0100000000000000" + "0200000000000000"},
		{Message{Request: GetInflightFD, Inflight: Inflight{1, 2, 3, 4, false}}, 0, "1f0000000100000014000000" +
			"0100000000000000" + "0200000000000000" + "03000400"},
		{Message{Request: GetInflightFD, Inflight: Inflight{1, 2, 3, 4, true}}, 0, "1f0000000100000018000000" +
			"0100000000000000" + "0200000000000000" + "0300040000000000"},
	} {
		b := c.m.Append(nil, 0)
		if got := hex.EncodeToString(b); got != c.wire {
			t.Errorf("message %d: %s, want %s", c.m.Request, got, c.wire)
		}
		_, m, err := parse(b, c.fds)
		if err != nil {
			t.Errorf("message %d: %v", c.m.Request, err)
		}
		if again := m.Append(nil, 0); !bytes.Equal(again, b) {
			t.Errorf("message %d became %x", c.m.Request, again)
		}
	}
}

func TestRefused(t *testing.T) {
	table := (&Message{Request: SetMemTable, Regions: make([]Region, 2)}).Append(nil, 0)
	nine := bytes.Clone(table)
	nine[HeaderSize] = 9
	for _, c := range []struct {
		why  string
		wire []byte
		fds  int
	}{
		{"version 2", AppendHeader(nil, GetFeatures, 0, 0)[:4:4], 0},
		{"not sent", AppendHeader(nil, GetFeatures, FlagReply, 0), 0},
		{"has 265 bytes", AppendHeader(nil, SetMemTable, 0, 265), 0},
		{"unknown message 0", AppendHeader(nil, 0, 0, 0), 0},
		{"unknown message 19", AppendHeader(nil, 19, 0, 0), 0},
		{"unknown message 41", AppendHeader(nil, 41, 0, 0), 0},
		{"unknown message 4294967295", AppendHeader(nil, ^Request(0), 0, 0), 0},
		{"message 2 has 0 bytes", AppendHeader(nil, SetFeatures, 0, 0), 0},
		{"message 1 has 8 bytes", append(AppendHeader(nil, GetFeatures, 0, 8), make([]byte, 8)...), 0},
		{"message 1 has 1 file", AppendHeader(nil, GetFeatures, 0, 0), 1},
		{"0 file descriptors instead of 1", (&Message{Request: SetVringCall}).Append(nil, 0), 0},
		{"1 file descriptors instead of 2", table, 1},
		{"3 file descriptors instead", table, 3},
		{"message 5 has 72 bytes", nine, 2},
		{"message 25 has 13 bytes", append(AppendHeader(nil, SetConfig, 0, 13), 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0), 0},
	} {
		b := c.wire
		if len(b) == 4 {
			b = append(b, 2, 0, 0, 0, 0, 0, 0, 0)
		}
		if _, _, err := parse(b, c.fds); err == nil || !strings.Contains(err.Error(), c.why) {
			t.Errorf("%s: %v", c.why, err)
		}
	}
}

func TestReplies(t *testing.T) {
	for _, c := range []struct {
		got  []byte
		want string
	}{
		{AppendNumber(nil, GetQueueNum, 4), "110000000500000008000000" + "0400000000000000"},
		{AppendState(nil, GetVringBase, State{1, 7}), "0b0000000500000008000000" + "0100000007000000"},
		{AppendConfig(nil, nil), "180000000500000000000000"},
		{AppendConfig(nil, &Config{0, 0, []byte{9, 8}}),
			"18000000050000000e000000" + "00000000" + "02000000" + "00000000" + "0908"},
		{AppendInflight(nil, &Inflight{1, 2, 3, 4, true}),
			"1f0000000500000018000000" + "0100000000000000" + "0200000000000000" + "0300040000000000"},
	} {
		if got := hex.EncodeToString(c.got); got != c.want {
			t.Errorf("%s, want %s", got, c.want)
		}
	}
}

// What is parsed, and sent again, is the same message.
func FuzzMessage(f *testing.F) {
	for r := range requests {
		m := Message{Request: Request(r), Regions: make([]Region, 1), Config: Config{Data: []byte{1}}}
		f.Add(m.Append(nil, FlagNeedReply), 1)
	}
	f.Fuzz(func(t *testing.T, b []byte, fds int) {
		if len(b) < HeaderSize {
			return
		}
		h, err := ParseHeader(b)
		if err != nil || len(b) < HeaderSize+int(h.Size) {
			return
		}
		var m Message
		if m.Parse(h, b[HeaderSize:HeaderSize+int(h.Size)], fds) != nil {
			return
		}
		again := m.Append(nil, h.Flags)
		h2, m2, err := parse(again, fds)
		if err != nil || h2.Request != h.Request || h2.Size != h.Size {
			t.Fatalf("%x became %x: %v", b, again, err)
		}
		if twice := m2.Append(nil, h.Flags); !bytes.Equal(again, twice) {
			t.Fatalf("%x, then %x", again, twice)
		}
	})
}
