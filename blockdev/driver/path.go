package driver

import "strings"

// HasProtocol tells whether name starts with "PROTOCOL:": a colon before the first slash.
func HasProtocol(name string) bool {
	i := strings.IndexAny(name, ":/")
	return i >= 0 && name[i] == ':'
}

// StripPrefix removes an explicit protocol from a file name. What then looks like another protocol
// is a file in the current folder.
func StripPrefix(name, prefix string) string {
	rest, ok := strings.CutPrefix(name, prefix)
	if ok && HasProtocol(rest) {
		return "./" + rest
	}
	return rest
}
