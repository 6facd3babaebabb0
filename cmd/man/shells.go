package man

import (
	"fmt"
	"strings"
)

// Option is an option of a command, as the shells need to know it.
type Option struct {
	Long  string // without dashes
	Short byte   // 0: none
	Arg   bool   // takes an argument: names of files are offered
	Text  string
}

// Completion returns a script that makes a shell complete the options of a command: bash, fish or
// zsh.
func Completion(shell, command string, options []Option) []byte {
	var b strings.Builder
	head := "# Completion of " + command + "'s options. Made of the command's own help by 'make man'. Do not edit.\n"
	switch shell {
	case "bash":
		var all []string
		for _, o := range options {
			all = append(all, "--"+o.Long)
		}
		fmt.Fprintf(&b, "%s_%s() {\n\tlocal word=${COMP_WORDS[COMP_CWORD]}\n\tif [[ $word == -* ]]; then\n"+
			"\t\tmapfile -t COMPREPLY < <(compgen -W %s -- \"$word\")\n\telse\n\t\tmapfile -t COMPREPLY < <(compgen -f -- \"$word\")\n"+
			"\tfi\n}\ncomplete -o filenames -F _%[2]s %[2]s\n", head, command, sh(strings.Join(all, " ")))
	case "fish":
		b.WriteString(head)
		for _, o := range options {
			fmt.Fprintf(&b, "complete -c %s -l %s", command, o.Long)
			if o.Short != 0 {
				fmt.Fprintf(&b, " -s %c", o.Short)
			}
			if o.Arg {
				b.WriteString(" -r")
			}
			fmt.Fprintf(&b, " -d %s\n", sh(o.Text))
		}
	case "zsh":
		fmt.Fprintf(&b, "#compdef %s\n%s_arguments", command, head)
		for _, o := range options {
			// Options can be given several times: define what another names before it.
			spec, arg := "["+zsh(o.Text)+"]", ""
			if o.Arg {
				arg = ":argument:_files"
			}
			if o.Short != 0 {
				fmt.Fprintf(&b, " \\\n\t%s", sh(fmt.Sprintf("*-%c%s%s", o.Short, spec, arg)))
			}
			fmt.Fprintf(&b, " \\\n\t%s", sh("*--"+o.Long+spec+arg))
		}
		b.WriteByte('\n')
	}
	return []byte(b.String())
}

// sh quotes a word for a shell.
func sh(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func zsh(s string) string {
	return strings.NewReplacer(`\`, `\\`, "[", `\[`, "]", `\]`, ":", `\:`).Replace(s)
}
