#!/usr/bin/env bash
# SmolLM2 against every peer, with tasks and long contexts; what was done before is not done again.
#
#     pip install gguf && DEVICE=cuda bash experiments/evidence/all.sh ../shared/data runs/evidence
#
# LIMIT=N takes the first N items of each task alone, SEEDS and BUDGETS fewer cells.
set -euo pipefail
data=$1 work=$2
device=${DEVICE:-cpu} seeds=${SEEDS:-0 1 2 3 4} budgets=${BUDGETS:-4.75 5.0 5.5 6.0}
results=experiments/evidence/results
model=$work/models/smollm2 text=$work/texts/smollm2.jsonl
[ -f "$model/config.json" ] ||
    python -m experiments.common.smollm2 --models "$work/models" --texts "$work/texts" --data "$data"
python -m experiments.long_context.passkey "$model" --tokens 2048 --out "$work/passkey"
mkdir -p "$work/gsm8k"
head -n -1319 "$data/gsm8k_train.jsonl" > "$work/gsm8k/train.jsonl"
tail -n 1319 "$data/gsm8k_train.jsonl" > "$work/gsm8k/test.jsonl"
sed "s|FOLDER|$work/gsm8k|" experiments/evidence/gsm8k.yaml > "$work/gsm8k/gsm8k_held_out.yaml"
tasks=$data/hellaswag_val.jsonl.gz,$work/gsm8k/gsm8k_held_out.yaml,$(ls "$work"/passkey/*.jsonl | paste -sd,)
for budget in $budgets; do
    run=$work/smollm2-$budget
    autoquant search "$model" --budget-bpe "$budget" --budget-scope searched --calibration "$text" \
        --sequence-length 2048 --report-by position --effort max --no-mlflow --device "$device" --out "$run"
    autoquant evaluate "$run" --tasks "$tasks" --assignment "bf16,uniform nvfp4,uniform fp8,winner" \
        --device "$device" ${LIMIT:+--limit "$LIMIT"}
    python -m experiments.evidence.collect "$run" --out "$results/smollm2-$budget.json"
done
for mode in w4a4 w4a16; do
    for seed in $seeds; do
        out=$results/peers-smollm2-$mode-$seed.json
        [ -f "$out" ] || python -m experiments.vs_modelopt.presets --subject smollm2 --seed "$seed" --mode "$mode" \
            --models "$work/models" --texts "$work/texts" --work "$work" --device "$device" --out "$out"
    done
done
python -m experiments.evidence.summary "$results" --picture experiments/evidence/kl.png
