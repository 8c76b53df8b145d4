#!/bin/sh
# Runs every fuzz target of the module for the time, or the number of inputs, given:
# 60s, 2000x. A short time can end in an error of the fuzzer itself on a busy machine.
# It fails if a target fails or if there is none.
set -u
time=${1:?usage: fuzz.sh TIME|COUNTx}
go=${GO:-go}
n=0
bad=0
for pkg in $($go list ./...); do
	dir=$($go list -f '{{.Dir}}' "$pkg")
	for target in $(grep -hos '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | sed 's/^func //'); do
		n=$((n + 1))
		if ! out=$($go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$pkg" 2>&1); then
			printf '%s\n' "$out"
			echo "FAILED $pkg $target"
			bad=1
		fi
	done
done
echo "$n fuzz targets, $time each"
[ "$n" -gt 0 ] || { echo "there are no fuzz targets"; exit 1; }
exit $bad
