package blockdev

import "strings"

// hasProtocol tells whether name starts with "PROTOCOL:": a colon before the first slash.
func hasProtocol(name string) bool {
	i := strings.IndexAny(name, ":/")
	return i >= 0 && name[i] == ':'
}

// combine makes name, relative to the folder of base, a path; absolute names stay. The
// protocol part of base is kept.
func combine(base, name string) string {
	if strings.HasPrefix(name, "/") {
		return name
	}
	cut := 0
	if hasProtocol(base) {
		cut = strings.IndexByte(base, ':') + 1
	}
	return base[:max(cut, strings.LastIndexByte(base, '/')+1)] + name
}

// stripPrefix removes an explicit protocol from a file name. What then looks like another
// protocol is a file in the current folder.
func stripPrefix(name, prefix string) string {
	rest, ok := strings.CutPrefix(name, prefix)
	if ok && hasProtocol(rest) {
		return "./" + rest
	}
	return rest
}
