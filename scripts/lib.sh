# Shared by the scripts; sourced, not run. Messages go to stderr so that a script's output stays its own.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=$top/.cache
export LC_ALL=C.UTF-8

say() { printf '== %s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

# The packages of packages.txt, one a line.
wanted_packages() { sed -e 's/#.*//' -e 's/[[:space:]]//g' -e '/^$/d' "$top/scripts/packages.txt"; }

# Configures once and builds what is given (default: everything). Quiet when there is nothing to do.
build() {
  local log=$cache/build.log
  mkdir -p "$cache"
  if [ ! -f "$top/build/build.ninja" ]; then
    say "configuring"
    (cd "$top" && cmake --preset release) >"$log" 2>&1 || { cat "$log" >&2; die "cmake failed"; }
  fi
  say "building${1:+ $*} (log: ${log#"$top"/})"
  local targets=()
  [ $# -eq 0 ] || targets=(--target "$@")
  cmake --build "$top/build" "${targets[@]}" >"$log" 2>&1 || { tail -n 40 "$log" >&2; die "the build failed"; }
}

# Whether the arguments ask for help, for which nothing has to be set up.
help_asked() {
  local word
  for word; do
    case $word in -h | --help) return 0 ;; esac
  done
  return 1
}

# For a script whose help is the comment at its head: prints it and ends when the arguments ask for it.
offer_help() {
  help_asked "$@" || return 0
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
}

# prepare [TARGET...] [-- GUEST...]: packages, what is to be built (default: everything), guests.
prepare() {
  local targets=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do targets+=("$1"); shift; done
  "$top/scripts/setup"
  build "${targets[@]}"
  [ $# -le 1 ] || "$top/scripts/fetch-guests" "${@:2}"
}

# apt-get with its download sandbox switched off for root, whose directories the _apt user cannot enter.
apt_get() {
  local options=(-q)
  [ "$(id -u)" != 0 ] || options+=(-o APT::Sandbox::User=root)
  apt-get "${options[@]}" "$@"
}
