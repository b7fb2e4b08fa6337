#!/bin/bash
# Every subject and seed, a process a core: bash experiments/vs_modelopt/all.sh OUT [ARGUMENTS]
out=$1
shift
mkdir -p "$out"
for seed in 0 1 2 3 4; do
  for subject in reference babyllama stories260K; do echo "$subject $seed"; done
done | OMP_NUM_THREADS=1 xargs -P "$(nproc)" -L 1 bash -c '
  subject=${*: -2:1} seed=${*: -1}
  python3 -W ignore -m experiments.vs_modelopt.run --subject "$subject" --seed "$seed" \
    --out "$1/$subject-$seed.json" "${@:2:$#-3}" >"$1/$subject-$seed.log" 2>&1
' run "$out" "$@"
