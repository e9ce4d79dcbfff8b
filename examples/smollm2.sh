#!/usr/bin/env bash
# A real model from end to end on a CPU: bash examples/smollm2.sh DATA.json FOLDER
# DATA.json: a list of rows of instruction, input and output, of which 64 are taken.
set -euo pipefail
data=$1
out=$2
mkdir -p "$out"

python -m benchmarks.study fetch smollm2 --output "$out/smollm2"
python - "$data" "$out" <<'END'
import json, sys
rows = json.load(open(sys.argv[1], encoding="utf-8"))
json.dump(rows[:64], open(f"{sys.argv[2]}/train.json", "w", encoding="utf-8"))
asked = [{"dataset": "alpaca", "instruction": row["instruction"]} for row in rows[64:68]]
json.dump(asked, open(f"{sys.argv[2]}/asked.json", "w", encoding="utf-8"))
END

common=(--model "$out/smollm2" --data "$out/train.json" --max_length 256 --layout padding_free
    --use_cpu true --disable_tqdm true)
sftmix score "${common[@]}" --output "$out/score" --num_scorings 2
sftmix split "$out/score" --by confidence
sftmix train "${common[@]}" --output "$out/sftmix" --partition "$out/score/confidence.parquet" \
    --max_steps 6 --logging_steps 1 --save_strategy no
sftmix generate --model "$out/sftmix" --format alpaca_eval --questions "$out/asked.json" \
    --output "$out/answers.json" --max_new_tokens 96 --use_cpu true --disable_tqdm true
sftmix report "$out/score" "$out/sftmix" --output "$out/report.html"

python - "$out/sftmix" <<'END'
import sys
from transformers import pipeline
answer = pipeline("text-generation", model=sys.argv[1])
turn = [{"role": "user", "content": "What is the capital of France?"}]
(found,) = answer(turn, max_new_tokens=96, do_sample=False)
print(found["generated_text"][-1])
END
