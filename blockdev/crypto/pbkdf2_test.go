package crypto

import (
	"bytes"
	"context"
	"crypto/pbkdf2"
	"errors"
	"testing"

	"qblockd/schema/types"
)

// Keys are those of the standard library, for all hashes and lengths.
func TestDeriveKey(t *testing.T) {
	for _, alg := range types.QCryptoHashAlgorithmValues {
		for _, n := range []int{1, 16, 20, 33, 64, 129} {
			want, err := pbkdf2.Key(hashes[alg].make, "sesame", []byte("salt"), 1025, n)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]byte, n)
			if err := DeriveKey(context.Background(), alg, []byte("sesame"), []byte("salt"), 1025, got); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				t.Errorf("%s, %d bytes: %x, want %x", alg, n, got, want)
			}
		}
	}
}

// A header may ask for hours of work: that ends with the command.
func TestDeriveKeyEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := DeriveKey(ctx, "sha256", nil, nil, 1<<32-1, make([]byte, 64)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestCountIterations(t *testing.T) {
	n, err := CountIterations(context.Background(), "sha256", 32)
	if err != nil || n < 1000 {
		t.Errorf("%d iterations a second, %v", n, err)
	}
}
