#!/bin/bash
# Every subject and seed, in parallel processes: bash experiments/vs_modelopt/all.sh OUT [ARGUMENTS]
# The bundled model runs on a GPU where there is one, and on the CPU where that fails.
out=$1
shift
mkdir -p "$out"
run() { # SUBJECT SEED DEVICE THREADS [ARGUMENTS]
  local subject=$1 seed=$2 device=$3 threads=$4
  shift 4
  OMP_NUM_THREADS=$threads python3 -W ignore -m experiments.vs_modelopt.run --subject "$subject" \
    --seed "$seed" --device "$device" --out "$out/$subject-$seed.json" "$@" \
    >"$out/$subject-$seed-$device.log" 2>&1
}
for seed in 0 1 2 3 4; do
  (run reference $seed cuda 1 "$@" || run reference $seed cpu 2 "$@") &
  run babyllama $seed cpu 1 "$@" &
  run stories260K $seed cpu 1 "$@" &
done
wait
