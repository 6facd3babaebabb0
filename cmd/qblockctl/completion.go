package main

import (
	"io"

	"github.com/spf13/cobra"
)

func (a *app) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "print a script that completes qblockctl's words in a shell",
		Long: "Prints what makes a shell complete commands, arguments and the names of nodes, jobs and exports of the daemon that runs.\n" +
			"bash: source <(qblockctl completion bash); zsh: source <(qblockctl completion zsh), after compinit;\n" +
			"fish: qblockctl completion fish | source",
		ValidArgs: []string{"bash", "fish", "zsh"},
		Args:      usageArgs(cobra.MatchAll(cobra.ExactArgs(1), cobra.OnlyValidArgs)),
		RunE: func(cmd *cobra.Command, args []string) error {
			switch root := cmd.Root(); args[0] {
			case "bash":
				_, err := io.WriteString(a.out, bashCompletion)
				return err
			case "zsh":
				return root.GenZshCompletion(a.out)
			default:
				return root.GenFishCompletion(a.out, true)
			}
		},
	}
}

// bashCompletion asks qblockctl itself. Cobra's own script needs the package bash-completion, which
// is often not there. The last line of an answer is a sum of cobra's directives: 2 is "no blank
// behind it", 4 "no names of files".
const bashCompletion = `# Completion of qblockctl in bash: source <(qblockctl completion bash)
_qblockctl() {
	local line=${COMP_LINE:0:COMP_POINT} words=() out=() word cut breaks= directive
	read -ra words <<<"$line"
	[[ $line == *[[:space:]] ]] && words+=("")
	mapfile -t out < <("${words[0]/#\~/$HOME}" __complete "${words[@]:1}" 2>/dev/null)
	(( ${#out[@]} )) || return
	directive=${out[-1]#:}
	unset 'out[-1]'
	# Bash replaces only what follows the last of its word breaks.
	[[ $COMP_WORDBREAKS == *=* ]] && breaks+==
	[[ $COMP_WORDBREAKS == *:* ]] && breaks+=:
	word=${words[-1]} cut=
	[[ $breaks && $word == *[$breaks]* ]] && cut=${word%"${word##*[$breaks]}"}
	COMPREPLY=()
	for word in "${out[@]}"; do
		word=${word%%$'\t'*}
		COMPREPLY+=("${word#"$cut"}")
	done
	(( directive & 2 )) && compopt -o nospace
	(( directive & 4 )) && compopt +o default
	return 0
}
complete -o default -F _qblockctl qblockctl
`
