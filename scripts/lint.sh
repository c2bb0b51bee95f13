#!/usr/bin/env bash
# Checks style, types, house rules, the stub against the compiled module, and that nothing of the test double is in it.
# --fix also reformats.
source "$(dirname "$0")/common.sh"
set_up
need ruff mypy clang_format rich || die "ruff, mypy, clang-format and rich are needed"
paths=(mnnvl_backend tests examples scripts setup.py)
sources=$(find csrc tests/native tests/fuzz -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | sort)

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
check "house rules" "$PYTHON" scripts/check_house.py
check "clang-format" xargs clang-format --dry-run --Werror <<<"$sources"
check "stub against module" "$PYTHON" -m mypy.stubtest mnnvl_backend._C --allowlist scripts/stubtest.allow --ignore-unused-allowlist
check "no test double in the module" "$PYTHON" scripts/check_symbols.py
[ ${#failed[@]} -eq 0 ] || die "failed: $(IFS=,; echo "${failed[*]}")"
