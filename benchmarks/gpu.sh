#!/usr/bin/env bash
# All GPU measurements of the kernels, in nine minutes at most:
#
#     bash benchmarks/gpu.sh OUT [--only tests|loss|perplexity]
#         [options of `python -m benchmarks gpu`]
#
# Leaves gpu.json, gpu.md (tables), perplexity.json, perplexity.md, pytest.txt, sanitizer.txt and
# log.txt in the folder OUT. Builds the extension in place first. Needs torch, triton, setuptools
# (77 or later), ninja, nvcc, pytest, hypothesis and numpy; the package need not be installed. A part
# that fails does not stop the next; the exit status then is 1. PYTHON chooses the interpreter.
set -euo pipefail

usage() {
    sed -n '3,6p' "$0" | cut -c3- >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
out=$1
shift
only=all
options=()
while (($#)); do
    case $1 in
    --only)
        only=${2:-}
        [[ $only == tests || $only == loss || $only == perplexity ]] || usage
        shift 2
        ;;
    *)
        options+=("$1")
        shift
        ;;
    esac
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
log=$out/log.txt
rm -f "$out"/{gpu,perplexity}.{json,md} "$out"/{pytest,sanitizer,log}.txt
ends=()
failed=0

say() {
    echo "$*" | tee -a "$log"
}

# note PART END: how a part ended, for the log and the table.
note() {
    say "== $1: $2"
    ends+=("| $1 | $2 |")
}

# part NAME SECONDS FILE COMMAND...: run it, whatever comes of it.
part() {
    local name=$1 limit=$2 file=$3 start=$SECONDS status=0
    shift 3
    say "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$file" || status=$?
    case $status in
    0) note "$name" "passed, $((SECONDS - start)) s" ;;
    124 | 137) note "$name" "FAILED: not done after $limit s" ;;
    *) note "$name" "FAILED: exit status $status" ;;
    esac
    ((status == 0)) || failed=1
}

facts() {
    "$python" -c 'import json; from benchmarks.measure import facts; print(json.dumps(facts()))'
    command -v nvidia-smi >/dev/null && nvidia-smi || echo "nvidia-smi: not found"
}

# left SECONDS: what the parts after this one leave it, for they need so many.
left() {
    echo $((530 - SECONDS - $1))
}

build() {
    part build 120 "$log" "$python" setup.py -q build_ext --inplace
}

tests() {
    part tests "$1" "$out/pytest.txt" \
        "$python" -m pytest -p no:cacheprovider -m gpu -ra --durations=10 tests/sftmix_kernels
    local sanitizer
    sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
    if [[ -z $sanitizer ]]; then
        note sanitizer "skipped: compute-sanitizer is neither on PATH nor in /usr/local/cuda/bin"
        return
    fi
    # Small and ragged, every op under every schedule. Without PyTorch's cache of memory each tensor
    # is an allocation of its own, so that a read past its end is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 60 "$out/sanitizer.txt" \
        "$sanitizer" --tool memcheck --error-exitcode 9 \
        "$python" -m benchmarks gpu --quick --no-peers
    # Of kernels that share memory between threads and are ours in CUDA.
    part racecheck 40 "$out/sanitizer.txt" \
        "$sanitizer" --tool racecheck --error-exitcode 9 \
        --kernel-name kns=fold_logits --kernel-name kns=add_token_losses \
        "$python" -m benchmarks gpu --quick --no-peers --only perplexity
}

# measure PART FILE SECONDS: it stops by itself before the limit, with what it has.
measure() {
    part "$1" "$3" "$log" "$python" -m benchmarks gpu --only "$1" --seconds $(($3 - 40)) \
        --json "$out/$2.json" --markdown "$out/$2.md" ${options[@]+"${options[@]}"}
}

facts 2>&1 | tee -a "$log" || note facts "FAILED: exit status $?"
build
case $only in
tests) tests "$(left 100)" ;;
loss) measure loss gpu "$(left 0)" ;;
perplexity) measure perplexity perplexity "$(left 0)" ;;
all)
    # Sanitizers 60 and 40, perplexity 70, loss at least 100; what is not spent goes to the losses.
    tests "$(left 270)"
    measure perplexity perplexity 70
    measure loss gpu "$(left 0)"
    ;;
esac
{
    printf '\n## Parts\n\n| part | end |\n| --- | --- |\n'
    printf '%s\n' "${ends[@]}"
} >>"$out/gpu.md"
exit "$failed"
