# Completion of qblockctl in bash: source <(qblockctl completion bash)
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
