#!/usr/bin/env bash
# Checks and times the kernels on a GPU machine, beside their peers, from what `cargo xtask gpu-bundle`
# packed.
#
#   gpu/run.sh check      the kernels against the oracle, and the tests of the tensor functions
#   gpu/run.sh time       timings, peers before and after, one report
#   gpu/run.sh matmul     the matrix product beside cuBLAS, one report
#   gpu/run.sh bench      every rung beside Burn's attention
#   gpu/run.sh all        check, time, bench
#   gpu/run.sh sanitize   small checks under compute-sanitizer
#   gpu/run.sh prism ...  the program `prism` with these arguments
#
# Results go to $OUT: run.json, table.md, records.csv, plots, run.log, and bench/. Budgets in seconds:
# CHECK_SECONDS, TIME_SECONDS, BENCH_SECONDS, PEER_SECONDS (a pass); processes at once: JOBS. PEERS=0
# leaves the peers out; RUNNER_ARGS goes to `runner time`, PEER_ARGS to peers.py; BUNDLE and WORK name the
# folder of the archives and the folder they are unpacked in. Of sanitize, TOOLS names the tools ("memcheck
# racecheck synccheck"), and PARTS the parts of the checks to run, as in 0-13/42: the first 14 of 42 parts.
set -euo pipefail

task=${1:-all}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bundle=${BUNDLE:-$here/../.gpu}
work=${WORK:-/tmp/prism-gpu}
mkdir -p "$work"
out=${OUT:-$work/out}
export PROGRAMS=$work/bin
runner=$here/runner.sh
whole=$PROGRAMS/whole
mkdir -p "$out"
# The end of the output is what a remote caller sees: the whole of it goes to a file too.
exec > >(tee -a "$out/run.log") 2>&1
tee=$!
trap 'exec >&- 2>&-; wait $tee' EXIT

unpack() {
    for archive in "$bundle"/*.tar.xz; do
        [ -e "$archive" ] || { echo "no archive in $bundle: cargo xtask gpu-bundle makes it"; exit 1; }
        local marker=$work/.unpacked-$(basename "$archive")
        if [ ! -e "$marker" ] || [ "$archive" -nt "$marker" ]; then
            tar -xJf "$archive" -C "$work"
            touch "$marker"
        fi
    done
    # A bare bundle: the checkout beside this script has the fixtures.
    [ -e "$work/fixtures" ] || ln -s "$here/../fixtures" "$work/fixtures"
}

# CubeCL panics without NVRTC and the CUDA headers: say it first.
find_cuda() {
    if [ -z "${CUDA_PATH:-}" ]; then
        local nvcc
        nvcc=$(readlink -f "$(command -v nvcc || true)" || true)
        for folder in /usr/local/cuda "${nvcc%/bin/nvcc}" /usr/local/cuda-*; do
            [ -e "$folder/include/cuda_fp16.h" ] && CUDA_PATH=$folder && break
        done
    fi
    [ -e "${CUDA_PATH:-}/include/cuda_fp16.h" ] || { echo "no CUDA headers: set CUDA_PATH"; exit 1; }
    export CUDA_PATH
    libraries=$CUDA_PATH/lib64
    for folder in "$CUDA_PATH"/targets/*/lib "$CUDA_PATH/lib" /usr/local/nvidia/lib64; do
        [ -d "$folder" ] && libraries+=:$folder
    done
    libraries+=${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
}

name_gpu() {
    PRISM_GPU=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -n 1)
    # The name alone begins it: see Run::merge.
    export PRISM_GPU=${PRISM_GPU/, / with driver }
    nvidia-smi --query-gpu=name,temperature.gpu,power.draw,clocks.sm,utilization.gpu --format=csv
}

# limited SECONDS COMMAND...: the programs keep their own budgets; this ends one that hangs.
limited() {
    local limit=$(($1 + 60))
    shift
    echo "\$ $*"
    timeout --kill-after=10 "$limit" "$@"
}

# runner SECONDS ARGS...: with CUDA's libraries, which torch must not see.
runner() {
    local limit=$1
    shift
    limited "$limit" env LD_LIBRARY_PATH="$libraries" "$runner" "$@"
}

failed=0
part() { "$@" || { echo "failed ($?): $*"; failed=1; }; }

# parallel SECONDS COMMAND...: once for each job, which finds its number and how many there are in $job and
# $jobs. Compiling kernels is most of the time of a check, and goes on in as many processes as there are.
jobs=${JOBS:-$(nproc)}
parallel() {
    local limit=$(($1 + 60)) pids=() job
    shift
    for job in $(seq 0 $((jobs - 1))); do
        job=$job jobs=$jobs limit=$limit "$@" > "$parts/job-$job.log" 2>&1 &
        pids+=($!)
    done
    for job in "${!pids[@]}"; do
        # Each on its own: all are waited for, and each failure is shown.
        wait "${pids[$job]}" || { tail -n 20 "$parts/job-$job.log"; failed=1; }
    done
}

check_part() {
    timeout --kill-after=10 "$limit" env LD_LIBRARY_PATH="$libraries" \
        "$runner" check --shard "$job" --shards "$jobs" --out "$parts/check-$job.json"
}

tests_part() {
    local names
    mapfile -t names < <(awk "NR % $jobs == $job" "$parts/names")
    [ ${#names[@]} -eq 0 ] || timeout --kill-after=10 "$limit" env LD_LIBRARY_PATH="$libraries" \
        "$whole" --test-threads 1 --exact "${names[@]}"
}

check() {
    parallel "${CHECK_SECONDS:-150}" check_part
    [ -e "$whole" ] || return 0
    export PRISM_TEST_DEVICES=cuda PRISM_FIXTURES=$work/fixtures
    # Neither those of the model, which a bundle may lack, nor those of the documentation.
    env LD_LIBRARY_PATH="$libraries" "$whole" --list --format terse |
        sed -n 's/: test$//p' | grep '^cases::' | grep -v -e '::smollm2::' -e '::docs_match_code::' > "$parts/names"
    parallel "${CHECK_SECONDS:-150}" tests_part
    cat "$parts"/job-*.log > "$out/tests.log"
    grep -c '^test .* ok$' "$out/tests.log" | sed 's/$/ tests passed/'
    grep '^test .* FAILED$' "$out/tests.log" || true
}

bench() {
    part runner "${BENCH_SECONDS:-120}" bench --seconds "${BENCH_SECONDS:-120}" --out "$out/bench"
}

peers() {
    [ "${PEERS:-1}" = 0 ] && return
    # shellcheck disable=SC2086
    PYTHONPATH=$work/peers${PYTHONPATH:+:$PYTHONPATH} part limited "${PEER_SECONDS:-75}" \
        python3 "$here/peers.py" --seconds "${PEER_SECONDS:-75}" --out "$parts/$1" ${PEER_ARGS:-}
}

measure() {
    # Before and after: what drifted in between shows in the spread.
    peers peers-before.json
    # shellcheck disable=SC2086
    part runner "${TIME_SECONDS:-240}" time --seconds "${TIME_SECONDS:-240}" \
        --out "$parts/time.json" ${RUNNER_ARGS:-}
    peers peers-after.json
}

products() {
    local PEER_ARGS=--matmul
    peers peers-before.json
    part runner "${TIME_SECONDS:-240}" matmul --seconds "${TIME_SECONDS:-240}" \
        --out "$parts/time.json"
    peers peers-after.json
}

report() {
    local found=()
    for file in "$parts"/check-*.json "$parts"/{time,peers-before,peers-after}.json; do
        [ -e "$file" ] && found+=("$file")
    done
    if [ ${#found[@]} -gt 0 ] && ! "$runner" merge "$out" "${found[@]}"; then
        # What was measured must not be lost with the report of it.
        cp "${found[@]}" "$out"
        failed=1
    fi
}

sanitize_part() {
    timeout --kill-after=10 "$limit" env LD_LIBRARY_PATH="$libraries" \
        compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 1 \
        "$runner" check --small --shard "$1" --shards "$2" --out "$parts/$tool-$1.json" \
        > "$out/$tool-$1-of-$2.log" 2>&1
}

# Every part that is this job's: see parallel.
sanitize_parts() {
    local part code=0
    for part in $(seq $((first + job)) "$jobs" "$last"); do
        sanitize_part "$part" "$of" || { code=1; echo "failed: $tool, part $part of $of"; }
    done
    return $code
}

sanitize() {
    # As many parts as jobs unless told: first-last/of.
    local range=${PARTS:-0-$((jobs - 1))/$jobs} tool
    if ! [[ $range =~ ^([0-9]+)-([0-9]+)/([0-9]+)$ ]]; then
        echo "PARTS is FIRST-LAST/OF, as in 0-13/42, got $range"
        exit 2
    fi
    local first=${BASH_REMATCH[1]} last=${BASH_REMATCH[2]} of=${BASH_REMATCH[3]}
    if ((first > last || last >= of)); then
        echo "of $of parts the last is $((of - 1)), got $range"
        exit 2
    fi
    for tool in ${TOOLS:-memcheck racecheck synccheck}; do
        parallel "${CHECK_SECONDS:-150}" sanitize_parts
        # racecheck's summary counts hazards, the others' errors.
        # Of earlier calls too: parts may be done a few at a time.
        awk -v tool="$tool" -v of="$of" '
            / checks, .* failed$/ { checks += $1; wrong += $3; done++ }
            /ERROR SUMMARY:/ { errors += $4 }
            /RACECHECK SUMMARY:/ { errors += $4 }
            END {
                printf "%s: %d of %d parts finished, %d checks done, %d of them failed, %d errors\n",
                    tool, done, of, checks, wrong, errors
            }' "$out/$tool"-*-of-"$of".log
    done
}

unpack
find_cuda
name_gpu
parts=$work/parts
rm -rf "$parts"
mkdir -p "$parts"
cd "$work"
case $task in
    check) check; report ;;
    time) measure; report ;;
    matmul) products; report ;;
    bench) bench ;;
    all) check; measure; report; bench ;;
    sanitize) sanitize ;;
    prism) part runner "${BENCH_SECONDS:-120}" prism "${@:2}" ;;
    *) echo "no task $task: check, time, matmul, bench, all, sanitize or prism"; exit 2 ;;
esac
exit $failed
