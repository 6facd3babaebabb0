# Completion of qblockd's options. Made of the command's own help by 'make man'. Do not edit.
_qblockd() {
	local word=${COMP_WORDS[COMP_CWORD]}
	if [[ $word == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W '--help --version --trace --blockdev --chardev --monitor --nbd-server --export --object --daemonize --pidfile --socket-mode --limit --image-policy --quickstart' -- "$word")
	else
		mapfile -t COMPREPLY < <(compgen -f -- "$word")
	fi
}
complete -o filenames -F _qblockd qblockd
