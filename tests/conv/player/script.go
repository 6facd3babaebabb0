package player

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// readSteps returns the steps of a conversation file: joined lines, without comments.
func readSteps(file string) ([]string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	lines := strings.Split(string(data), "\n")
	var out []string
	for i := 0; i < len(lines); i++ {
		ln := lines[i]
		for strings.HasSuffix(ln, `\`) && !strings.HasPrefix(ln, "!raw") && !strings.HasPrefix(ln, "#") && i+1 < len(lines) {
			i++
			ln = strings.TrimRight(strings.TrimSuffix(ln, `\`), " ") + " " + strings.TrimSpace(lines[i])
		}
		if s := strings.TrimSpace(ln); s != "" && !strings.HasPrefix(ln, "#") {
			out = append(out, s)
		}
	}
	return out, nil
}

// splitWords splits like a shell: blanks separate, single and double quotes group, a backslash
// escapes.
func splitWords(s string) (words []string) {
	var w strings.Builder
	in, quote := false, byte(0)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case quote == '\'' && c == '\'', quote == '"' && c == '"':
			quote = 0
		case quote == '\'':
			w.WriteByte(c)
		case c == '\\' && i+1 < len(s) && (quote == 0 || s[i+1] == '"' || s[i+1] == '\\'):
			i++
			w.WriteByte(s[i])
			in = true
		case quote == '"':
			w.WriteByte(c)
		case c == '\'' || c == '"':
			quote, in = c, true
		case c == ' ' || c == '\t' || c == '\n':
			if in {
				words = append(words, w.String())
				w.Reset()
			}
			in = false
		default:
			w.WriteByte(c)
			in = true
		}
	}
	if in {
		words = append(words, w.String())
	}
	return words
}

// unescape reads the escapes of !raw.
func unescape(s string) []byte {
	var out []byte
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' || i+1 == len(s) {
			out = append(out, s[i])
			continue
		}
		i++
		if s[i] == 'x' && i+2 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+3], 16, 8); err == nil {
				out = append(out, byte(n))
				i += 2
				continue
			}
		}
		c := s[i]
		if k := strings.IndexByte("nrt0e", c); k >= 0 {
			c = "\n\r\t\x00\x1b"[k]
		}
		out = append(out, c)
	}
	return out
}

var connPrefix = regexp.MustCompile(`^\s*@(\w+)\s?`)

// connArg takes a leading @NAME off; the default is main.
func connArg(rest string) (name, body string) {
	if m := connPrefix.FindStringSubmatchIndex(rest); m != nil {
		return rest[m[2]:m[3]], rest[m[1]:]
	}
	return "main", rest
}

// quietWords are directives that leave no line in the transcript.
var quietWords = map[string]bool{"mask": true, "sort": true, "keep": true, "drop": true, "plain": true,
	"timeout": true, "sleep": true, "sub": true}

// rule does the directives that only change how the transcript is written; false if word is none of
// them.
func (p *play) rule(word, rest string) bool {
	switch word {
	case "mask":
		p.norm.masks = append(p.norm.masks, parsePath(rest))
	case "sort":
		p.norm.sorts = append(p.norm.sorts, parsePath(rest))
	case "keep":
		at, names, _ := strings.Cut(strings.TrimSpace(rest), " ")
		p.norm.keeps = append(p.norm.keeps, keepRule{parsePath(at), strings.Fields(names)})
	case "drop":
		at, kv, _ := strings.Cut(strings.TrimSpace(rest), " ")
		k, v, _ := strings.Cut(kv, "=")
		p.norm.drops = append(p.norm.drops, dropRule{parsePath(at), k, v})
	case "sub":
		from, to, _ := strings.Cut(strings.TrimSpace(rest), " => ")
		p.norm.subs = append(p.norm.subs, subRule{regexp.MustCompile(from), pyGroup.ReplaceAllString(to, "$${$1}")})
	case "plain":
		p.norm.plain()
	case "timeout":
		n, _ := strconv.ParseFloat(strings.TrimSpace(rest), 64)
		p.limit = p.begin.Add(time.Duration(n * float64(time.Second)))
	case "sleep":
		n, _ := strconv.ParseFloat(strings.TrimSpace(rest), 64)
		time.Sleep(min(time.Duration(n*float64(time.Millisecond)), time.Until(p.limit)))
	default:
		return false
	}
	return true
}

// subst fills in ${DIR} and the like.
func (p *play) subst(s string) string {
	return substName.ReplaceAllStringFunc(s, func(ref string) string {
		name := ref[2 : len(ref)-1]
		switch {
		case name == "DIR":
			return p.root
		case name == "SOCK":
			return p.root + "/main.sock"
		case name == "NBD":
			return p.root + "/nbd.sock"
		case name == "SERVER":
			return p.server
		case name == "PID":
			return strconv.Itoa(p.pid())
		case strings.HasPrefix(name, "MON:"):
			n := name[4:]
			return fmt.Sprintf("--chardev socket,id=%s,path=%s/%s.sock,server=on,wait=off --monitor %s", n, p.root, n, n)
		}
		return ref
	})
}
