#!/usr/bin/env bash
# A real model from end to end on a CPU, with the extras plots and peft installed:
#     bash examples/real_model.sh smollm2|gemma3 DATA.json FOLDER [ROWS]
# DATA.json: a list of rows of instruction, input and output. The first ROWS (400 by default) are
# trained on, the next 40 are held out, and the four after these are asked. FOLDER is a new one.
set -euo pipefail
usage="usage: real_model.sh smollm2|gemma3 DATA.json FOLDER [ROWS]"
model=${1:?$usage}
data=$(realpath -e "${2:?$usage}")
out=$(realpath -m "${3:?$usage}")
rows=${4:-400}
# Before the half hour that it takes, what fails only at its end.
python -c "import matplotlib, peft, scipy, sklearn"
cd "$(dirname "$0")/.." # where benchmarks.study is
mkdir -p "$out"

python -m benchmarks.study fetch "$model" --output "$out/model"
python - "$data" "$out" "$rows" <<'END'
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    rows = json.load(file)
end = int(sys.argv[3])
asked = [
    {
        "dataset": "alpaca",
        "instruction": "\n\n".join(filter(None, (row["instruction"], row.get("input")))),
    }
    for row in rows[end + 40 : end + 44]
]
for name, part in (("train", rows[:end]), ("held_out", rows[end : end + 40]), ("asked", asked)):
    with open(f"{sys.argv[2]}/{name}.json", "w", encoding="utf-8") as file:
        json.dump(part, file, indent=1)
END

recipe=(--model "$out/model" --data "$out/train.json" --max_length 256 --layout padding_free
    --per_device_train_batch_size 8 --use_cpu true --disable_tqdm true)
once=(--num_train_epochs 1 --logging_steps 10 --save_strategy no --eval_data "$out/held_out.json")

sftmix score "${recipe[@]}" --learning_rate 5e-5 --num_scorings 2 --output "$out/score"
sftmix split "$out/score" --by confidence

mixed=(--partition "$out/score/confidence.parquet" "${once[@]}")
sftmix plan "${recipe[@]}" --gpu_memory 8GB || [ $? -eq 3 ] # 3: it would not fit
sftmix train "${recipe[@]}" "${mixed[@]}" --learning_rate 5e-5 --method ntp --output "$out/ntp"
sftmix train "${recipe[@]}" "${mixed[@]}" --learning_rate 5e-5 --output "$out/sftmix"
sftmix train "${recipe[@]}" "${mixed[@]}" --learning_rate 5e-4 --lora_rank 16 --output "$out/lora"

for run in sftmix lora; do
    sftmix generate --model "$out/$run" --format alpaca_eval --questions "$out/asked.json" \
        --output "$out/answers-$run.json" --max_new_tokens 96 --use_cpu true --disable_tqdm true
done
sftmix report "$out/score" "$out/ntp" "$out/sftmix" "$out/lora" --examples 100 \
    --output "$out/report.html"

python - "$out/sftmix" <<'END'
import sys
from transformers import pipeline
answer = pipeline("text-generation", model=sys.argv[1], device="cpu")
turn = [{"role": "user", "content": "What is the capital of France?"}]
(found,) = answer(turn, max_new_tokens=96, do_sample=False)
print(found["generated_text"][-1])
END
