#!/usr/bin/env bash
# Run everything that a GPU has to show, in nine minutes at most:
#
#     bash benchmarks/gpu.sh OUT [--only tests|perplexity|step|memory|loss|tune|long] [--wheels DIR]
#         [--dry-run] [options of `python -m benchmarks run`]
#
# It builds the extension in place for this machine, runs the tests that need a GPU, memcheck and
# racecheck, and the suites. The folder OUT gets cuda-SUITE.json, RESULTS.md, pictures and log.txt,
# eight files at most. A part that fails does not stop the next; the exit status then is 1.
#
# --wheels installs what the folder holds, only for these runs: peers, or `datasets`, without which
# the suite `step` is left out. --dry-run tries all of it out on the CPU at tiny sizes. PYTHON
# chooses the interpreter. It needs torch (2.11 or later), triton, setuptools (77 or later), ninja,
# nvcc, pytest, hypothesis, numpy, tqdm and matplotlib; the package need not be installed.
#
# `tune` and `long` run only when they are named. `long` trains the 8B-shaped model on long
# sequences in every mode, a process for each, of which the nine minutes hold the shorter lengths.
# It needs peft and `datasets` too, leaves cuda-long_sequence-8B.json, and goes on with one that is
# there.
set -euo pipefail

usage() {
    sed -n '4,5p' "$0" | cut -c3- >&2
    exit 2
}

[[ $# -ge 1 && $1 != -* ]] || usage
out=$1
shift
only=all
wheels=
device=cuda
options=()
while (($#)); do
    case $1 in
    --only)
        only=${2:-}
        [[ $only =~ ^(tests|perplexity|step|memory|loss|tune|long)$ ]] || usage
        shift 2
        ;;
    --wheels)
        wheels=${2:-}
        [[ -d $wheels ]] || usage
        wheels=$(cd "$wheels" && pwd)
        shift 2
        ;;
    --dry-run)
        device=cpu
        options+=(--quick)
        shift
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
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONPATH="$scratch/site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
log=$out/log.txt
# `long` goes on with what is there.
[[ $only == long ]] || rm -f "$out"/{cpu,cuda}-*.{json,svg}
rm -f "$out"/RESULTS.md "$log"
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

# part NAME SECONDS COMMAND...: run it, whatever comes of it.
part() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    say "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$log" || status=$?
    case $status in
    0) note "$name" "passed, $((SECONDS - start)) s" ;;
    124 | 137) note "$name" "FAILED: not done after $limit s" ;;
    *) note "$name" "FAILED: exit status $status" ;;
    esac
    ((status == 0)) || failed=1
}

facts() {
    "$python" -c 'import json; from benchmarks.measure import facts; print(json.dumps(facts()))' ||
        return
    timeout 20 nvidia-smi || echo "nvidia-smi: not found, or no answer"
}

# left SECONDS: print the seconds that this part has if the parts after it need SECONDS; 20 or more.
left() {
    local seconds=$((530 - SECONDS - $1))
    echo $((seconds > 20 ? seconds : 20))
}

tests() {
    local folders=(tests/sftmix_kernels)
    # The trainer needs what the suite `step` needs.
    if "$python" -c "import datasets, accelerate, xxhash" 2>/dev/null; then
        folders+=(tests/sftmix/{training/test_methods,model/test_one_by_one,model/test_tiled_mlp}.py)
    fi
    part tests "$1" "$python" -m pytest -p no:cacheprovider -m gpu -q -rf --durations=5 \
        "${folders[@]}"
}

sanitizer() {
    local tool
    tool=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
    if [[ -z $tool || $device == cpu ]]; then
        note sanitizer "skipped: it needs a GPU, and compute-sanitizer on PATH or in /usr/local/cuda"
        return
    fi
    local ours=(-m benchmarks run --device cuda --quick --no-peers --out "$scratch")
    # Sizes are small and ragged, and every op runs under every schedule. Without PyTorch's cache of
    # memory each tensor is an allocation of its own, so that a read past its end is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 part memcheck 60 \
        "$tool" --target-processes all --tool memcheck --error-exitcode 9 \
        "$python" "${ours[@]}" loss
    # Only our CUDA kernels that share memory between threads.
    part racecheck 40 \
        "$tool" --target-processes all --tool racecheck --error-exitcode 9 \
        --kernel-name kns=fold_logits --kernel-name kns=add_token_losses \
        "$python" "${ours[@]}" perplexity -k "not scoring"
}

# suite NAME SECONDS: run it; it begins no round when two thirds are over, and keeps what it has.
suite() {
    part "$1" "$2" "$python" -m benchmarks run "$1" --device "$device" --out "$out" \
        --seconds $(($2 * 2 / 3)) ${options[@]+"${options[@]}"}
}

# long SECONDS: measure shorter lengths first; the file says what was not reached.
long() {
    part long "$1" "$python" -m benchmarks.long_sequence run --model 8B --device "$device" \
        --out "$out" --seconds $(($1 - 15)) ${options[@]+"${options[@]}"}
    part plot "$(left -10)" "$python" -m benchmarks.long_sequence plot "$out"
}

if [[ -n $wheels ]]; then
    part wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile \
        --target "$scratch/site" "$wheels"/*.whl
fi
facts 2>&1 | tee -a "$log" || note facts "FAILED: exit status $?"
part build 120 "$python" setup.py -q build_ext --inplace
case $only in
tests)
    tests "$(left 110)"
    sanitizer
    ;;
all)
    # What is not spent goes to the losses.
    tests "$(left 390)"
    sanitizer
    suite perplexity 60
    suite loss "$(left 130)"
    suite step 60
    suite memory "$(left 20)"
    ;;
long) long "$(left 20)" ;;
*) suite "$only" "$(left 20)" ;;
esac
[[ $only == tests || $only == long ]] || part plot "$(left -10)" "$python" -m benchmarks plot "$out"
# It would be the ninth file; `plot` draws it again from the data.
[[ $only != all ]] || rm -f "$out"/*-step.svg
{
    printf '\n## Parts of `benchmarks/gpu.sh`\n\n| part | end |\n| --- | --- |\n'
    printf '%s\n' "${ends[@]}"
} >>"$out/RESULTS.md"
exit "$failed"
