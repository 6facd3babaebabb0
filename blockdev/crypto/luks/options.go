package luks

import (
	"context"
	"strings"

	"qblockd/blockdev/crypto"
	"qblockd/schema/types"
)

func pick[T any](p *T, def T) T {
	if p != nil {
		return *p
	}
	return def
}

// NewAs is New as options say; millis is how long keys are to take to be made of passwords.
func NewAs(
	ctx context.Context, o *types.QCryptoBlockCreateOptionsLUKS,
) (h *Header, master *crypto.Key, millis int64, err error) {
	proto := Header{Hash: pick(o.HashAlg, types.QCryptoHashAlgorithmSha256), Spec: crypto.Spec{
		Alg:    pick(o.CipherAlg, types.QCryptoCipherAlgorithmAes256),
		Mode:   pick(o.CipherMode, types.QCryptoCipherModeXts),
		IV:     pick(o.IvgenAlg, types.QCryptoIVGenAlgorithmPlain64),
		IVHash: pick(o.IvgenHashAlg, ""),
	}}
	if proto.IV == types.QCryptoIVGenAlgorithmEssiv && proto.IVHash == "" {
		proto.IVHash = types.QCryptoHashAlgorithmSha256
	}
	if err := proto.Check(); err != nil {
		return nil, nil, 0, err
	}
	millis = pick(o.IterTime, DefaultMillis)
	h, master, err = New(ctx, proto, millis)
	return h, master, millis, err
}

// Info is what queries show.
func (h *Header) Info() types.QCryptoBlockInfoLUKS {
	data := types.QCryptoBlockInfoLUKS{
		CipherAlg: h.Alg, CipherMode: h.Mode, IvgenAlg: h.IV, HashAlg: h.Hash,
		PayloadOffset: h.PayloadOffset(), MasterKeyIters: int64(h.Iterations), Uuid: strings.ToValidUTF8(h.UUID, "\uFFFD"),
	}
	if h.IV == types.QCryptoIVGenAlgorithmEssiv {
		data.IvgenHashAlg = &h.IVHash
	}
	for i := range h.Slots {
		s := &h.Slots[i]
		out := &types.QCryptoBlockInfoLUKSSlot{Active: s.Active, KeyOffset: int64(s.Offset) * sector}
		if s.Active {
			iters, stripes := int64(s.Iterations), int64(s.Stripes)
			out.Iters, out.Stripes = &iters, &stripes
		}
		data.Slots = append(data.Slots, out)
	}
	return data
}
