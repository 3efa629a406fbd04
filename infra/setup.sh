#!/bin/sh
# Makes .venv with all that the demo and the tests need, from PyPI, and nothing outside this folder. Needs only
# Python 3.11 or newer with pip. A second run does nothing, so every recipe of the justfile starts with it.
#   cuda  SGLang's own full set, where an NVIDIA driver is present
#   cpu   what SGLang needs to serve without one: no CUDA kernel packages
# pip's find-links (where some machines keep a CPU build of torch) are passed on to uv, which does not read them.
set -eu
cd "$(dirname "$0")/.."

fail() { echo "setup: $1" >&2; exit 1; }

python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "no $python here; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" -V 2>&1); Python 3.11 or newer is needed (set PYTHON to choose another)"

if [ -e /proc/driver/nvidia/version ] || nvidia-smi -L >/dev/null 2>&1; then
    extra=cuda
else
    extra=cpu
fi
settings=infra/install/$extra.toml pins=infra/install/$extra.txt

wanted="$extra $PWD $(cat pyproject.toml infra/setup.sh "$settings" "$pins" | cksum)"
[ "$wanted" != "$(cat .venv/installed 2>/dev/null)" ] || exit 0

echo "setup: installing into .venv with the extra '$extra' (once; about 3 GB on disk with a CPU build of torch)"
# Without pip and through pip's --python: works where Debian keeps python3-venv and the system's packages apart.
[ -x .venv/bin/python ] || "$python" -m venv --without-pip .venv
[ -x .venv/bin/uv ] && [ -x .venv/bin/just ] ||
    "$python" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check uv rust-just ||
    fail "pip could not install uv and rust-just (Debian: apt install python3-pip)"

links=${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}
UV_FIND_LINKS=${UV_FIND_LINKS:-$(echo $links | tr ' ' ',')}
[ -n "$UV_FIND_LINKS" ] && export UV_FIND_LINKS || unset UV_FIND_LINKS
# Compiled once here: every engine process imports thousands of modules, and some machines never write their bytecode.
.venv/bin/uv pip install --python .venv/bin/python --compile-bytecode --config-file "$settings" --constraints "$pins" \
    --group dev --editable ".[$extra]"
echo "$wanted" > .venv/installed
