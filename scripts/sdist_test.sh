#!/usr/bin/env bash
# What a user of a release gets: sdist, wheel built from the unpacked sdist, installed in a fresh environment that knows
# nothing of this source tree but uses the torch at hand, and a quick set of the tests run against it there.
# usage: sdist_test.sh [extra pytest arguments...]
source "$(dirname "$0")/common.sh"
find_python
need pytest pytest_timeout || die "pytest and pytest-timeout are needed"
"$PYTHON" -m pip --version >/dev/null 2>&1 || die "pip is needed for $PYTHON"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
mkdir "$WORK/source" "$WORK/tests"

say "sdist"
# From a copy without anything that was built, or setuptools would list what an earlier build has left.
git ls-files --cached --others --exclude-standard | while read -r file; do [ ! -e "$file" ] || echo "$file"; done |
  sort >"$WORK/files"
tar cf - -T "$WORK/files" | tar xf - -C "$WORK/source"
(cd "$WORK/source" && "$PYTHON" setup.py -q sdist --dist-dir "$WORK") >"$WORK/log" 2>&1 || { cat "$WORK/log" >&2; die "no sdist"; }
tar xzf "$WORK"/*.tar.gz -C "$WORK"
TREE=$(echo "$WORK"/mnnvl_backend-*/)
missing=$(comm -23 "$WORK/files" <(cd "$TREE" && find . -type f | sed 's|^\./||' | sort))
[ -z "$missing" ] || die "files that the sdist does not hold (MANIFEST.in): $missing"

say "wheel from the sdist"
export MNNVL_CUDA_ARCHS=${MNNVL_CUDA_ARCHS:-90}
# With a compiler cache at hand the sdist's copies of the sources are found again: by paths relative to the tree, also of
# torch's headers, which lie in a .venv beside the sources as in the project's root.
export CCACHE_BASEDIR=${TREE%/} CCACHE_NOHASHDIR=1
BUILDER=$PYTHON
[ "$PYTHON" != "$ROOT/.venv/bin/python" ] || { ln -s "$ROOT/.venv" "$TREE/.venv"; BUILDER=${TREE%/}/.venv/bin/python; }
"$BUILDER" -m pip wheel -q --no-build-isolation --no-deps --no-index -w "$WORK" "$TREE" >"$WORK/log" 2>&1 ||
  { tail -n 60 "$WORK/log" >&2; die "no wheel from the sdist"; }
WHEEL=$(echo "$WORK"/*.whl)
"$PYTHON" scripts/check_symbols.py "$WHEEL"

say "tests against the wheel"
"$PYTHON" -m venv --without-pip "$WORK/venv"
FRESH=$WORK/venv/bin/python
"$PYTHON" -m pip --python "$FRESH" install -q --no-deps --no-index "$WHEEL"
# torch and the test packages of the parent environment. Folders named in a .pth file are searched after the venv's own,
# and .pth files in them (an editable install) are not read.
"$PYTHON" -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")' \
  >"$("$FRESH" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth"
unset PYTHONPATH
cp -r "$TREE/tests" "$TREE/pyproject.toml" "$TREE/README.md" "$WORK/tests"
cd "$WORK/tests"
"$FRESH" - "$WORK/venv" "$(cat "$ROOT/VERSION")" <<'PY'
import importlib.metadata, sys
import torch  # registers the backend through the wheel's entry point
import mnnvl_backend, mnnvl_backend._C as core
venv, version = sys.argv[1:]
for module in (mnnvl_backend, core):
    assert module.__file__.startswith(venv), module.__file__
assert importlib.metadata.version("mnnvl-backend") == version, importlib.metadata.version("mnnvl-backend")
assert torch.distributed.Backend.MNNVL == "mnnvl"
print(f"{core.__file__.split('/')[-1]} of the wheel, version {version}, kernels: {core.build_info()}")
PY
export OMP_NUM_THREADS=1
"$FRESH" -m pytest -q -p no:cacheprovider tests/collectives/test_all_reduce.py tests/package \
  -k "(all_reduce and cpu) or options or mapping or import_registers or default_backend" "$@"
