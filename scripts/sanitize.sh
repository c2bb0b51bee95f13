#!/usr/bin/env bash
# Every kernel under compute-sanitizer, on however many GPUs there are: two ranks may share one. Each section of each tool
# runs a few tests under a time limit; at the end a table, and exit code 1 where a tool reported an error, a test failed, or
# nothing ran.
# usage: sanitize.sh [--tool memcheck,racecheck,synccheck] [--section lamport,channels,fused,graphs,operations]
#                    [--list] [--record FILE]
# SANITIZE_SECONDS: of a section (default 150). SANITIZE_OPTIONS: further options of compute-sanitizer.
source "$(dirname "$0")/common.sh"

# What each section runs, and the kernels' sources that it is for. A kernel takes 10 to 50 times as long here, so of each a
# test or two. All sections run kernels/host/probes.cu too, at set-up.
declare -A KERNELS=(
  [lamport]="lamport/oneshot_allreduce.cu lamport/twoshot_allreduce.cu lamport/reduce_scatter.cu"
  [channels]="channel/exchange.cu channel/reduce.cu"
  [fused]="lamport/oneshot_fused.cu lamport/twoshot_fused.cu"
  [graphs]="lamport/oneshot_allreduce.cu lamport/twoshot_allreduce.cu"
  [operations]="lamport/oneshot_allreduce.cu lamport/reduce_scatter.cu channel/exchange.cu channel/reduce.cu"
)
declare -A TESTS=(
  [lamport]="tests/collectives/test_all_reduce.py::test_any_alignment[cuda-oneshot]
    tests/collectives/test_all_reduce.py::test_any_alignment[cuda-twoshot]
    tests/collectives/test_reduce_scatter.py::test_layouts[cuda-2]
    tests/function/test_function.py::test_sums[cuda-2]"
  [channels]="tests/collectives/test_point_to_point.py::test_every_dtype[cuda-2]
    tests/collectives/test_point_to_point.py::test_layouts[cuda]
    tests/collectives/test_reductions.py::test_every_reduction[cuda-1001]"
  [fused]="tests/function/test_fused.py::test_random_cases[cuda-2]
    tests/function/test_fused.py::test_many_rows[cuda-2]"
  [graphs]="tests/collectives/test_graphs.py::test_sizes_replayed_between_eager_calls[2-oneshot]
    tests/collectives/test_graphs.py::test_sizes_replayed_between_eager_calls[2-twoshot]
    tests/collectives/test_graphs.py::test_sizes_replayed_between_eager_calls[2-windows]"
  [operations]="tests/collectives/test_every_operation.py::test_every_operation[cuda-2]"
)
declare -A CASES=([fused]=6 [operations]=60) # MNNVL_TEST_CASES; of the operations a quarter on GPUs
SECTIONS=(lamport channels fused graphs operations)

# racecheck sees hazards in shared memory alone, so only the kernels that use it, and of these only the fused ones: the
# channels' warps tell each other what is done by words that are stored with release and loaded with acquire, and each
# such pair is a race to it (that load and that store are all it reports). Not initcheck: under it a kernel
# that touches memory of another process ends in "unspecified launch failure", the first one of set-up already (CUDA 13.0).
declare -A TOOLS=(
  [memcheck]="lamport channels fused graphs operations"
  [racecheck]="fused"
  [synccheck]="lamport channels fused"
)

tools=(memcheck racecheck synccheck) sections=("${SECTIONS[@]}") record="" list=0
known() { # what, the known ones as one word, given...
  local what=$1 all=$2 one
  shift 2
  for one; do [[ " $all " == *" $one "* ]] || die "$what: expected one of $all, got '$one'"; done
}
while [ $# -gt 0 ]; do
  case $1 in
    --tool | --section | --record) [ $# -ge 2 ] || die "$1 wants a value" ;;&
    --tool) IFS=, read -ra tools <<<"$2" && shift 2 ;;
    --section) IFS=, read -ra sections <<<"$2" && shift 2 ;;
    --record) record=$2 && shift 2 ;;
    --list) list=1 && shift ;;
    *) die "unknown argument '$1'; see the head of $0" ;;
  esac
done
known --tool "memcheck racecheck synccheck" "${tools[@]}"
known --section "${SECTIONS[*]}" "${sections[@]}"

if [ "$list" = 1 ]; then
  for section in "${sections[@]}"; do
    for kernel in ${KERNELS[$section]}; do echo "$section kernel $kernel"; done
    for test in ${TESTS[$section]}; do echo "$section test $test"; done
    for tool in "${tools[@]}"; do
      [[ " ${TOOLS[$tool]} " != *" $section "* ]] || echo "$section tool $tool"
    done
  done
  exit 0
fi

command -v compute-sanitizer >/dev/null || die "compute-sanitizer is not in PATH; it comes with the CUDA toolkit"
[ "${SANITIZE_BUILT:-0}" = 1 ] && [ -n "${PYTHON:-}" ] || set_up # gpu_check.sh has built
export OMP_NUM_THREADS=1
LOGS=$ROOT/build/sanitize
mkdir -p "$LOGS"
failed=0
rows=()

# Ranks are processes of a pool, which may be killed before they sum up: reports count as well as summaries do.
errors_in() {
  { cat "$@" 2>/dev/null || true; } | awk '
    /ERROR SUMMARY: [0-9]+ error/ { match($0, /SUMMARY: [0-9]+/); summed += substr($0, RSTART + 9, RLENGTH - 9) }
    /RACECHECK SUMMARY: [0-9]+ hazard/ { match($0, /SUMMARY: [0-9]+/); summed += substr($0, RSTART + 9, RLENGTH - 9) }
    /^========= (Invalid|Uninitialized|Barrier error|Divergent|Error:|Warning: Race|Misaligned|Hardware exception)/ { ++seen }
    END { print (summed > seen ? summed : seen) + 0 }'
}

run_section() {
  local tool=$1 section=$2 status=0 begin=$SECONDS errors passed verdict=ok folder=$LOGS/$1-$2
  rm -rf "$folder" && mkdir -p "$folder"
  say "$tool: $section"
  # Set-up asks the driver for things that it may refuse, which is no error of a kernel.
  # shellcheck disable=SC2086  # lists of words
  MNNVL_TEST_CASES=${CASES[$section]:-40} MNNVL_TEST_PATIENCE=2 timeout --kill-after=20 "${SANITIZE_SECONDS:-150}" \
    compute-sanitizer --tool "$tool" --target-processes all --report-api-errors no --error-exitcode 9 \
    --log-file "$folder/%p.log" ${SANITIZE_OPTIONS:-} \
    "$PYTHON" -m pytest -q -p no:cacheprovider --timeout "${SANITIZE_SECONDS:-150}" ${TESTS[$section]} \
    >"$folder/tests.txt" 2>&1 || status=$?
  errors=$(errors_in "$folder"/*.log "$folder/tests.txt")
  passed=$(grep -oE '[0-9]+ passed' "$folder/tests.txt" | tail -n 1 || true)
  [ "$status" = 0 ] || verdict="exit code $status"
  [ "$status" != 124 ] && [ "$status" != 137 ] || verdict="out of time"
  [ -n "$passed" ] || verdict="no test passed ($verdict)"
  grep -qs '^=========' "$folder"/*.log "$folder/tests.txt" || verdict="the tool said nothing ($verdict)"
  [ "$errors" = 0 ] || verdict="errors"
  if [ "$verdict" != ok ]; then
    failed=1
    { cat "$folder"/*.log 2>/dev/null | grep -vE '^=========? *$' | head -n 40; tail -n 20 "$folder/tests.txt"; } || true
  fi
  rows+=("$(printf '| %-9s | %-10s | %-9s | %6s | %4s s | %s |' "$tool" "$section" "${passed:-none}" "$errors" \
    $((SECONDS - begin)) "$verdict")")
}

for tool in "${tools[@]}"; do
  for section in "${sections[@]}"; do
    [[ " ${TOOLS[$tool]} " != *" $section "* ]] || run_section "$tool" "$section"
  done
done
[ ${#rows[@]} -gt 0 ] || die "none of these tools runs any of these sections"
table=$(printf '%s\n' "| tool      | section    | tests     | errors | time   | verdict |" \
  "| --------- | ---------- | --------- | -----: | -----: | ------- |" "${rows[@]}")
printf '%s\n' "" "$table"
[ -z "$record" ] || printf '\n## compute-sanitizer\n\n%s\n' "$table" >>"$record"
exit "$failed"
