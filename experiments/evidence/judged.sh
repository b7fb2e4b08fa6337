#!/usr/bin/env bash
# Checkpoints of PrismaQuant and AutoRound beside ours at the same bytes, by one judge; what was done before is not done again.
#
#     pip install prismaquant==0.16.2 auto-round==0.16.1
#     DEVICE=cuda bash experiments/evidence/judged.sh MODEL TEXT runs/judged
#
# BUDGETS takes fewer cells. PrismaQuant refuses a work folder under /tmp.
set -euo pipefail
model=$1 text=$2 work=$3
device=${DEVICE:-cuda} budgets=${BUDGETS:-4.75 5.0 5.5 6.0} name=$(basename "$1")
results=experiments/evidence/results
mkdir -p "$work" "$results"
for budget in $budgets; do
    out=$results/judged-$name-w4a4-$budget.json
    [ -f "$out" ] && continue
    [ -f "$work/ours-$budget/result.json" ] ||
        python -m autoquant search "$model" --budget-bpe "$budget" --budget-scope searched --calibration "$text" \
            --sequence-length 256 --effort max --no-mlflow --device "$device" --out "$work/ours-$budget"
    for peer in prismaquant autoround; do
        [ -f "$work/$peer-$budget/made.json" ] ||
            python -m experiments.evidence.$peer "$model" --text "$text" --budget-bpe "$budget" --device "$device" \
                --work "$work/$peer" --out "$work/$peer-$budget"
    done
    python -m experiments.evidence.judge "$model" --text "$text" --budget-bpe "$budget" --device "$device" \
        --ours "$work/ours-$budget" --peers "$work/prismaquant-$budget" "$work/autoround-$budget" --out "$out"
done
