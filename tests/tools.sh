#!/bin/sh
# Installs the outside programs that some tests use. Does nothing where that is not possible: those tests then
# skip. With the argument "missing" it only tells, after the tests, what they had to do without.
need=""
for pair in qemu-storage-daemon:qemu-system-common qemu-img:qemu-utils qemu-system-x86_64:qemu-system-x86 \
	mke2fs:e2fsprogs nbdinfo:libnbd-bin nbdkit:nbdkit cryptsetup:cryptsetup-bin fio:fio socat:socat fusermount3:fuse3 jq:jq tmux:tmux python3:python3; do
	command -v "${pair%%:*}" >/dev/null 2>&1 || need="$need ${pair##*:}"
done
python3 -c 'import nbd' 2>/dev/null || /usr/bin/python3 -c 'import nbd' 2>/dev/null || need="$need python3-libnbd"
# A kernel for the guest of tests/guest: the package is unpacked, not installed.
guest=/var/cache/qblockd/guest
kernel=linux-image-cloud-amd64
[ "$(uname -m)" = x86_64 ] && ! ls "$guest"/boot/vmlinuz-* >/dev/null 2>&1 || kernel=""
[ -z "$need$kernel" ] && exit 0
if [ "$1" = missing ]; then
	echo "tests: SKIPPED what needs programs of these packages, which are not there: $need $kernel" >&2
	exit 0
fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
	echo "tests: not installed and not installable here: $need $kernel; the tests that use them are skipped" >&2
	exit 0
fi
echo "tests: installing $need $kernel" >&2
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null
# shellcheck disable=SC2086
[ -z "$need" ] || apt-get install -q -y --no-install-recommends $need >/dev/null ||
	echo "tests: could not install$need; the tests that use them are skipped" >&2
[ -z "$kernel" ] && exit 0
tmp=$(mktemp -d)
# The package is an empty one that names the latest kernel.
latest=$(apt-cache depends "$kernel" | sed -n 's/^ *Depends: *//p' | head -n 1)
mkdir -p "$guest" && chmod 755 "$tmp" && { (cd "$tmp" && apt-get download -q "$latest") && dpkg -x "$tmp"/*.deb "$guest"; } >/dev/null 2>&1 ||
	echo "tests: could not get $kernel; the tests with a guest are skipped" >&2
rm -rf "$tmp"
exit 0
