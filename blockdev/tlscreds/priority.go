package tlscreds

import (
	"crypto/tls"
	"fmt"
	"slices"
	"strings"
)

// versions are those of TLS that there are, the lowest first.
var versions = []struct {
	name  string
	value uint16
}{{"TLS1.2", tls.VersionTLS12}, {"TLS1.3", tls.VersionTLS13}}

// ParsePriority reads GnuTLS' notation of what may be negotiated as far as it can be kept to, and
// returns the lowest and the highest version of TLS: a level (NORMAL, SECURE128, PFS, PERFORMANCE),
// then versions that come (":+VERS-TLS1.3") and go (":-VERS-ALL").
//
// All of these levels are met: what is negotiated has forward secrecy and keys of at least 128
// bits. Who asks for more, or for certain ciphers, is refused.
func ParsePriority(s string) (low, high uint16, err error) {
	const whole = "Cannot set TLS session priority %s: "
	words := strings.Split(s, ":")
	if !slices.Contains([]string{"NORMAL", "SECURE128", "PFS", "PERFORMANCE"}, words[0]) {
		return 0, 0, fmt.Errorf(whole+"'%s' is not supported, use NORMAL", s, words[0])
	}
	on := make([]bool, len(versions))
	for i := range on {
		on[i] = true
	}
	for _, word := range words[1:] {
		if !setVersion(on, word) {
			return 0, 0, fmt.Errorf(whole+"'%s' is not supported, only VERS-TLS1.2, VERS-TLS1.3 and VERS-ALL can be "+
				"added and removed", s, word)
		}
	}
	for i, v := range versions {
		if on[i] {
			low, high = min(low-1, v.value-1)+1, v.value // 0 is more than any
		}
	}
	if high == 0 {
		return 0, 0, fmt.Errorf(whole+"no version of TLS is left", s)
	}
	return low, high, nil
}

// setVersion does one word; it is false for one that cannot be done.
func setVersion(on []bool, word string) bool {
	if word == "" {
		return false
	}
	name, ok := strings.CutPrefix(word[1:], "VERS-")
	add := word[0] == '+'
	if !ok || !add && word[0] != '-' && word[0] != '!' {
		return false
	}
	switch name {
	case "ALL", "TLS-ALL":
		for i := range on {
			on[i] = add
		}
		return true
	case "TLS1.0", "TLS1.1", "SSL3.0":
		return !add // those are never negotiated
	}
	for i, v := range versions {
		if v.name == name {
			on[i] = add
			return true
		}
	}
	return false
}
