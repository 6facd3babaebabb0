package model

import (
	"fmt"
	"strings"
)

// Doc is a documentation comment, taken apart.
type Doc struct {
	Body     string            // what the thing is for
	Members  map[string]string // by member, argument or value
	Features map[string]string
	Returns  string
	Since    string // version of QEMU that had it first
}

// parseDoc takes apart the comment of the definition called name. The form is
//
//	@name:
//
//	body
//
//	@member: text
//	    more text
//
//	Features:
//
//	@feature: text
//
//	Returns: text
//
//	Since: version
func parseDoc(name, text string) (Doc, error) {
	d := Doc{Members: map[string]string{}, Features: map[string]string{}}
	lines := strings.Split(text, "\n")
	if lines[0] != "@"+name+":" {
		return d, fmt.Errorf("the comment above '%s' starts with %q, not with \"@%s:\"", name, lines[0], name)
	}
	into, section := &d.Body, d.Members
	var key string
	flush := func() {
		if key != "" {
			section[key] = *into
		}
		key = ""
	}
	for _, l := range lines[1:] {
		switch {
		case l == "Features:":
			flush()
			section, into = d.Features, &d.Body
		case strings.HasPrefix(l, "Returns: "):
			flush()
			d.Returns, into = strings.TrimPrefix(l, "Returns: "), &d.Returns
		case strings.HasPrefix(l, "Since: "):
			flush()
			d.Since, into = strings.TrimPrefix(l, "Since: "), &d.Since
		case strings.HasPrefix(l, "@"):
			k, t, ok := strings.Cut(l[1:], ": ")
			if !ok {
				return d, fmt.Errorf("the comment above '%s' has a line %q without \": \"", name, l)
			}
			flush()
			if _, dup := section[k]; dup {
				return d, fmt.Errorf("the comment above '%s' describes '%s' twice", name, k)
			}
			key, into = k, new(string)
			*into = t
		case l == "":
			if into == &d.Body && d.Body != "" {
				d.Body += "\n\n"
			}
		default:
			t := strings.TrimSpace(l)
			if *into != "" && !strings.HasSuffix(*into, "\n") {
				t = " " + t
			}
			*into += t
		}
	}
	flush()
	d.Body = strings.TrimSpace(d.Body)
	return d, nil
}
