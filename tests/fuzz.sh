#!/bin/sh
# Runs every fuzz target of the module, one after the other, for the time given.
set -e
time=${1:-30s}
go list ./... | while read -r pkg; do
	go test -list '^Fuzz' "$pkg" 2>/dev/null | grep '^Fuzz' | while read -r f; do
		echo "== $pkg $f"
		go test -run '^$' -fuzz "^$f\$" -fuzztime "$time" "$pkg" </dev/null
	done
done
