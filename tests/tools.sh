#!/bin/sh
# Installs the outside programs that some tests use. Does nothing where that is not possible: those tests then
# skip. With the argument "missing" it only tells, after the tests, what they had to do without.
need=""
for pair in qemu-storage-daemon:qemu-system-common qemu-img:qemu-utils qemu-system-x86_64:qemu-system-x86 \
	nbdinfo:libnbd-bin nbdkit:nbdkit cryptsetup:cryptsetup-bin fio:fio socat:socat jq:jq tmux:tmux python3:python3; do
	command -v "${pair%%:*}" >/dev/null 2>&1 || need="$need ${pair##*:}"
done
python3 -c 'import nbd' 2>/dev/null || /usr/bin/python3 -c 'import nbd' 2>/dev/null || need="$need python3-libnbd"
[ -z "$need" ] && exit 0
if [ "$1" = missing ]; then
	echo "tests: SKIPPED what needs programs of these packages, which are not installed:$need" >&2
	exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
	echo "tests: not installed and not installable here:$need; the tests that use them are skipped" >&2
	exit 0
fi
echo "tests: installing$need" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
{ apt-get update -q && apt-get install -q -y --no-install-recommends $need; } >/dev/null ||
	echo "tests: could not install$need; the tests that use them are skipped" >&2
exit 0
