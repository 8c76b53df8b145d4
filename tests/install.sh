#!/bin/sh
# Installs the Debian packages that the black-box suites need, only those that
# are missing. Without root or apt-get it says what is missing and goes on: the
# suites then skip with a reason.
set -u
packages="user-mode-linux nfs-common rpcbind libnfs-utils nfs-ganesha nfs-ganesha-vfs iproute2 fio dbench stress-ng git gcc libc6-dev e2fsprogs procps util-linux keepalived ctdb nftables ethtool etcd-server debootstrap systemd-container dpkg"
missing=
for p in $packages; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
# The Debian tree of the suites that run cluster managers and systemd.
tree() {
	[ "$(id -u)" = 0 ] && sh "$(dirname "$0")/debtree.sh" >/dev/null
	exit 0
}
[ -z "$missing" ] && tree
if ! command -v apt-get >/dev/null 2>&1; then
	echo "tests/install.sh: no apt-get here; not installed:$missing" >&2
	exit 0
fi
if [ "$(id -u)" != 0 ]; then
	echo "tests/install.sh: installing packages needs root; missing:$missing" >&2
	echo "tests/install.sh: run as root, or expect the suites that need them to be skipped" >&2
	exit 0
fi
echo "tests/install.sh: installing$missing" >&2
# The services of these packages must not start on this machine: the suites run
# their own in namespaces.
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e $policy ]; then
	printf '#!/bin/sh\nexit 101\n' >$policy && chmod 755 $policy && made=1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q >/dev/null && apt-get install -q -y --no-install-recommends $missing >/tmp/baton-install.$$ 2>&1
status=$?
if [ $status != 0 ]; then
	cat /tmp/baton-install.$$ >&2
	echo "tests/install.sh: apt-get failed; the suites that need the packages will be skipped" >&2
fi
rm -f /tmp/baton-install.$$
[ -n "$made" ] && rm -f $policy
tree
