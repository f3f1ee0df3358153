#!/usr/bin/env bash
# How the files of this folder were obtained: from the npm registry, unchanged.  Run it to check or renew them.
set -euo pipefail
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

take() {  # package version file…
  local name=$1 version=$2
  shift 2
  (cd "$work" && npm pack --silent "$name@$version" >/dev/null && tar xzf "$name-$version.tgz")
  for file in "$@"; do cp "$work/package/dist/$file" .; done
  { echo "$name $version"; echo; cat "$work/package/LICENSE"; } > "LICENSE.$name"
  rm -rf "$work/package"
}

take uplot 1.6.32 uPlot.iife.min.js uPlot.min.css
take d3-selection 3.0.1 d3-selection.min.js
take d3-hierarchy 3.1.3 d3-hierarchy.min.js
