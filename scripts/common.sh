# Shared by the commands in this folder: finds or makes a Python with torch, and builds. Sourced, from bash.
# Sets PYTHON; afterwards "$PYTHON" imports torch and mnnvl_backend from anywhere.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
TORCH_MINIMUM=2.11
TORCH_PINNED=2.13.0 # installed where torch is missing and no NVIDIA GPU is present

say() { printf '\033[1m== %s\033[0m\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Does this Python import a torch that is new enough? Without plugins: ours may be installed but broken.
has_torch() {
  command -v "$1" >/dev/null 2>&1 && TORCH_DEVICE_BACKEND_AUTOLOAD=0 "$1" - "$TORCH_MINIMUM" >/dev/null 2>&1 <<'PY'
import sys, torch
version = lambda text: tuple(map(int, text.split("+")[0].split(".")[:2]))
sys.exit(version(torch.__version__) < version(sys.argv[1]))
PY
}

has_modules() { "$PYTHON" -c 'import importlib.util, sys; sys.exit(any(importlib.util.find_spec(m) is None for m in sys.argv[1:]))' "$@"; }

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q .; }

python_new_enough() { command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; }

make_venv() {
  python_new_enough python3 || die "Python 3.10 or newer is needed as python3"
  if [ ! -x .venv/bin/python ]; then
    say "making .venv"
    # Debian's python3 comes without ensurepip; a venv made half is worse than none.
    if ! python3 -m venv .venv; then
      rm -rf .venv
      die "python3 can't make virtual environments; on Debian and Ubuntu: apt install python3-venv python3-dev g++"
    fi
  fi
  PYTHON=$ROOT/.venv/bin/python
}

install_torch() {
  has_torch "$PYTHON" && return
  if has_gpu; then
    say "installing torch for NVIDIA GPUs"
    "$PYTHON" -m pip install -q "torch>=$TORCH_MINIMUM"
  else
    say "installing torch $TORCH_PINNED (no NVIDIA GPU here)"
    "$PYTHON" -m pip install -q "torch==$TORCH_PINNED"
  fi
}

# pip package names follow from the module names but for these.
package_of() {
  case $1 in
    sklearn) echo scikit-learn ;;
    pytest_timeout) echo pytest-timeout ;;
    clang_format) echo clang-format ;;
    *) echo "$1" ;;
  esac
}

# Installs the packages of modules that can't be imported; only ever into a virtual environment.
need() {
  local missing=() module
  for module in "$@"; do has_modules "$module" || missing+=("$(package_of "$module")"); done
  [ ${#missing[@]} -eq 0 ] && return
  [ "$INSTALL" = 1 ] || return 1
  say "installing ${missing[*]}"
  "$PYTHON" -m pip install -q "${missing[@]}"
}

# Builds without a word when it goes well, and shows the end of the log when not.
build() {
  local log=build/build.log
  mkdir -p build
  command -v "${CXX:-c++}" >/dev/null 2>&1 || die "no C++ compiler; on Debian and Ubuntu: apt install g++ python3-dev"
  say "building (log in $log; the first time takes minutes)"
  if ! "$@" >"$log" 2>&1; then
    # The compiler's words; what follows them in the log is Python's way out.
    sed '/Traceback (most recent call last)/q' "$log" | tail -n 60 >&2
    die "the build failed; the whole log is in $log"
  fi
  sed -n 's/^ *\(mnnvl_backend: .*\)/\1/p' "$log"
}

# Sets PYTHON, which imports torch, and INSTALL: 1 where packages may be installed for it. An active virtual environment is
# used as it is; else an interpreter at hand that imports a suitable torch, where nothing is installed; else .venv in the
# project's root.
find_python() {
  if [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
    PYTHON=$VIRTUAL_ENV/bin/python INSTALL=1
    # One that can't install anything but has torch is used like any interpreter with torch.
    "$PYTHON" -m pip --version >/dev/null 2>&1 || INSTALL=0
    [ "$INSTALL" = 0 ] || install_torch
  elif [ ! -x .venv/bin/python ] && has_torch python3; then
    PYTHON=$(command -v python3) INSTALL=0
  else
    INSTALL=1
    make_venv
    install_torch
  fi
  has_torch "$PYTHON" || die "$PYTHON does not import torch >= $TORCH_MINIMUM, and nothing may be installed there"
  # Tools installed beside the interpreter (ninja, torchrun) come first.
  export PATH="$(dirname "$PYTHON"):$PATH" PYTHON
  need setuptools wheel numpy || say "note: numpy or setuptools is missing and nothing is installed into $PYTHON"
  command -v ninja >/dev/null 2>&1 || need ninja || die "ninja is needed to build"
}

# find_python, and the package built for it. Where nothing may be installed it is built in place and run from the source
# tree, so that a GPU machine without a network works.
set_up() {
  find_python
  if [ "$INSTALL" = 1 ]; then
    build "$PYTHON" -m pip install -v --no-build-isolation --no-deps -e .
  else
    build "$PYTHON" setup.py build_ext --inplace
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  fi
}
