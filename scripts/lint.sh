#!/usr/bin/env bash
# Checks style, types, include rules, and the stub against the compiled module. --fix also reformats.
source "$(dirname "$0")/common.sh"
set_up
need ruff mypy clang_format rich || die "ruff, mypy, clang-format and rich are needed"
paths=(mnnvl_backend tests scripts setup.py)
sources=$(git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

if [ "${1:-}" = --fix ]; then
  "$PYTHON" -m ruff check -q --fix "${paths[@]}" || true
  "$PYTHON" -m ruff format -q "${paths[@]}"
  xargs clang-format -i <<<"$sources"
fi

failed=()
check() {
  local name=$1
  shift
  say "$name"
  "$@" || failed+=("$name")
}
check "ruff" "$PYTHON" -m ruff check "${paths[@]}"
check "ruff format" "$PYTHON" -m ruff format --check "${paths[@]}"
check "mypy" "$PYTHON" -m mypy
check "include rules" "$PYTHON" scripts/check_includes.py
check "clang-format" xargs clang-format --dry-run --Werror <<<"$sources"
check "stub against module" "$PYTHON" -m mypy.stubtest mnnvl_backend._C --allowlist scripts/stubtest.allow --ignore-unused-allowlist
[ ${#failed[@]} -eq 0 ] || die "failed: $(IFS=,; echo "${failed[*]}")"
