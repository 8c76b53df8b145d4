#!/bin/sh
# Makes a tree of Debian 12 with the cluster managers and systemd that suites run
# in namespaces, and prints its path. Tests put an overlay over it: the tree
# itself is never written to. Made once, about a minute, and again when this file
# changes. Needs root, debootstrap and a Debian mirror.
#
#   sh tests/debtree.sh [DIRECTORY]        default: /var/cache/baton-tests
set -eu
cache=${1:-${BATON_DEBTREE_CACHE:-/var/cache/baton-tests}}
suite=bookworm
packages="systemd systemd-sysv dbus iproute2 iputils-ping procps keepalived pacemaker pacemaker-cli-utils corosync resource-agents libxml2-utils ctdb nftables netcat-openbsd"
version=$(cksum <"$0" | cut -d' ' -f1)
tree=$cache/debian-$suite-$version

if [ -e "$tree/.complete" ]; then
	echo "$tree"
	exit 0
fi
if [ "$(id -u)" != 0 ]; then
	echo "tests/debtree.sh: making the tree needs root" >&2
	exit 1
fi
if ! command -v debootstrap >/dev/null 2>&1; then
	echo "tests/debtree.sh: install debootstrap" >&2
	exit 1
fi
mkdir -p "$cache/debs"
exec 9>"$cache/lock"
flock 9
if [ -e "$tree/.complete" ]; then
	echo "$tree"
	exit 0
fi
# Trees of earlier versions of this file, and what was broken off.
rm -rf "$cache"/debian-"$suite"-*
mirror=
for f in /etc/apt/sources.list /etc/apt/sources.list.d/*; do
	[ -f "$f" ] || continue
	# Of a Debian archive only: other archives have other suites.
	mirror=$(sed -n -e 's/^URIs: *\(http[^ ]*\/debian\/*\)\( .*\)*$/\1/p' -e 's/^deb \(\[[^]]*\] \)\{0,1\}\(http[^ ]*\/debian\/*\) .*/\2/p' "$f" | head -n 1)
	[ -n "$mirror" ] && break
done
# Nothing of the tree is worth a flush.
DPKG_FORCE=unsafe-io debootstrap --variant=minbase --cache-dir="$cache/debs" \
	--include="$(echo $packages | tr ' ' ,)" "$suite" "$tree.new" "${mirror:-http://deb.debian.org/debian}" >"$cache/log" 2>&1 || {
	tail -n 20 "$cache/log" >&2
	rm -rf "$tree.new"
	echo "tests/debtree.sh: debootstrap failed; the whole of its output is in $cache/log" >&2
	exit 1
}
rm -rf "$tree.new"/var/cache/apt/archives/*.deb "$tree.new"/usr/share/doc "$tree.new"/usr/share/man "$tree.new"/usr/share/locale
touch "$tree.new/.complete"
mv "$tree.new" "$tree"
echo "$tree"
