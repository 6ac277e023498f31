#!/usr/bin/env bash
# Makes .venv with the package and everything in constraints.txt; `make install` calls it when it is out of date.
# Reads   setup.py, constraints.txt
# Writes  .venv/, .venv/setup_seconds (how long it took), .venv/.installed (last: the stamp of the Makefile)
# Environment
#   PYTHON           interpreter to build on, 3.10 or newer (default python3)
#   TORCH_INDEX_URL  package index for torch alone, for instance one with CPU wheels (default: pip's configuration)
# Example  TORCH_INDEX_URL=https://INDEX/cpu launch/install.sh
# Needs no GPU and builds no CUDA code. An interrupted installation is continued by the same command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { echo "[install] $*"; }

# missing WHAT APT_PACKAGES DNF_PACKAGES: names what is missing and the command that installs it.
missing() {
  local command="apt-get install $2"
  command -v apt-get >/dev/null || ! command -v dnf >/dev/null || command="dnf install $3"
  ((EUID == 0)) || command="sudo $command"
  echo "$1 is missing; install it with: $command"
}

fail() {
  echo "error: $1" >&2
  exit 1
}

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$(missing "$python" "python3 python3-venv" python3)"
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "$python is Python $version; 3.10 or newer is needed: make install PYTHON=python3.12"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
  fail "$(missing "the venv module of Python $version" "python$version-venv" "python3-libs")"
command -v "${CXX:-g++}" >/dev/null ||
  say "note: $(missing "the C++ compiler (DeepSpeed uses it for optimizers in host memory)" g++ gcc-c++)"

started=$SECONDS
rm -f .venv/.installed
if [[ $(.venv/bin/python -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) != "$version" ]]; then
  say "creating .venv with Python $version ($(command -v "$python"))"
  "$python" -m venv --clear .venv
fi

export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1
pip=(.venv/bin/python -m pip install -qq --constraint constraints.txt)
if [[ -n ${TORCH_INDEX_URL:-} ]]; then
  say "installing torch from TORCH_INDEX_URL"
  "${pip[@]}" --no-deps --index-url "$TORCH_INDEX_URL" torch
fi
say "installing the package and what it needs; torch is large, this can take minutes"
"${pip[@]}" --editable '.[dev]'
.venv/bin/python -c 'import unified_rl.config, torch; print("[install] torch", torch.__version__)'

echo "$((SECONDS - started))" >.venv/setup_seconds
touch .venv/.installed
say "done in $((SECONDS - started)) s"
