#!/bin/sh
# Builds the Debian package and prints its path.
#
#   sh packaging/deb/build.sh [DIRECTORY]      default: dist
#
# Needs Go and dpkg-deb, no privileges. The same source makes the same package.
#
#   VERSION      instead of what git describe says
#   MAINTAINER   "Name <address>"
#   BATON        a program that is built already
set -eu
umask 022
cd "$(dirname "$0")/../.."
out=${1:-dist}
here=packaging/deb
GO=${GO:-go}
maintainer=${MAINTAINER:-baton maintainers <maintainers@baton-nfs.github.io>}

# v1.2.0 -> 1.2.0; 5 commits later -> 1.2.0+5.gabcdef0; no tag, or no git at all: what
# the source says, below its release.
if [ -z "${VERSION:-}" ]; then
	VERSION=$(git describe --tags --match 'v[0-9]*' 2>/dev/null | sed -e 's/^v//' -e 's/-\([0-9]*\)-g/+\1.g/' -e 's/-/~/g') || :
	if [ -z "$VERSION" ]; then
		VERSION=$(sed -n 's/^var Version = "\(.*\)"$/\1/p' internal/status/version.go | sed 's/-/~/g')
		commit=$(git rev-parse --short=12 HEAD 2>/dev/null) && VERSION=$VERSION+$(git rev-list --count HEAD).g$commit
	fi
fi
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
arch=$($GO env GOARCH)
case $arch in 386) arch=i386 ;; arm) arch=armhf ;; ppc64le) arch=ppc64el ;; esac

tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
d=$tmp/baton
put() { # MODE SOURCE TARGET
	install -D -m "$1" "$2" "$d$3"
}

if [ -n "${BATON:-}" ]; then
	put 755 "$BATON" /usr/bin/baton
else
	mkdir -p "$d/usr/bin"
	CGO_ENABLED=0 $GO build -trimpath -ldflags "-s -w -X github.com/baton-nfs/baton/internal/status.Version=$VERSION" -o "$d/usr/bin/baton" ./cmd/baton
fi
chmod 755 "$d/usr/bin/baton"
baton=$d/usr/bin/baton
if [ "$($GO env GOARCH)" != "$($GO env GOHOSTARCH)" ]; then
	# The pages come from the program itself.
	baton=$tmp/native
	GOARCH=$($GO env GOHOSTARCH) CGO_ENABLED=0 $GO build -o "$baton" ./cmd/baton
fi

put 644 packaging/systemd/baton.service /lib/systemd/system/baton.service
put 644 packaging/systemd/baton.socket /lib/systemd/system/baton.socket
put 644 packaging/systemd/logind-baton.conf /usr/lib/systemd/logind.conf.d/baton.conf
put 644 packaging/systemd/50-baton.conf /usr/lib/sysctl.d/50-baton.conf
put 644 packaging/systemd/sysusers-baton.conf /usr/lib/sysusers.d/baton.conf

mkdir -p "$d/usr/share/man/man1" "$d/usr/share/man/man5"
"$baton" man "$d/usr/share/man/man1"
mv "$d"/usr/share/man/man1/*.5 "$d/usr/share/man/man5/"
gzip -9n "$d"/usr/share/man/man?/*
for sh in bash:bash-completion/completions/baton zsh:zsh/vendor-completions/_baton fish:fish/vendor_completions.d/baton.fish; do
	"$baton" completion "${sh%%:*}" >"$tmp/completion"
	put 644 "$tmp/completion" "/usr/share/${sh#*:}"
done

[ ! -e packaging/ocf/baton-vip ] || put 755 packaging/ocf/baton-vip /usr/lib/ocf/resource.d/baton/baton-vip
if [ -d packaging/ctdb ]; then
	put 755 packaging/ctdb/baton-callout /usr/share/baton/ctdb/baton-callout
	put 755 packaging/ctdb/baton.script /usr/share/baton/ctdb/baton.script
	put 644 packaging/ctdb/nfs-checks.d/10.baton.check /usr/share/baton/ctdb/nfs-checks.d/10.baton.check
fi
doc=/usr/share/doc/baton
for f in packaging/keepalived/*.conf; do
	[ ! -e "$f" ] || put 644 "$f" "$doc/examples/$(basename "$f")"
done
mkdir -p "$d$doc/examples"
"$baton" config --print-default >"$d$doc/examples/baton.toml"
put 644 $here/exports.example $doc/examples/exports
for f in README.md docs/quickstart.md docs/configuration.md docs/operations.md docs/design.md; do
	put 644 $f $doc/$(basename $f)
done
find "$d$doc" -maxdepth 1 -name '*.md' -size +4k -exec gzip -9n {} +
put 644 $here/copyright $doc/copyright
cat >"$tmp/changelog" <<END
baton ($VERSION) unstable; urgency=medium

  * Built from the source of this version. What has changed is told by its
    version control.

 -- $maintainer  $(date -R -u -d "@$SOURCE_DATE_EPOCH")
END
put 644 "$tmp/changelog" $doc/changelog
gzip -9n "$d$doc/changelog"
put 644 $here/lintian-overrides /usr/share/lintian/overrides/baton

mkdir -p "$d/DEBIAN"
for f in postinst prerm postrm; do
	install -m 755 $here/$f "$d/DEBIAN/$f"
done
size=$(du -ks "$d" | cut -f1)
sed -e "s/@VERSION@/$VERSION/" -e "s/@ARCH@/$arch/" -e "s/@SIZE@/$size/" -e "s/@MAINTAINER@/$maintainer/" $here/control >"$d/DEBIAN/control"
(cd "$d" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum) >"$d/DEBIAN/md5sums"
find "$d" -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +

mkdir -p "$out"
deb=$out/baton_${VERSION}_$arch.deb
dpkg-deb --root-owner-group -Zxz -z"${XZ:-6}" --build "$d" "$deb" >/dev/null
echo "$deb"
