#!/usr/bin/env bash
# The runs behind the README's table: DPO on the toy at s = 1, 10, 100 and inf, three seeds each.
#
#     bash results/sweep.sh              # about 25 minutes on 2 CPU cores; finished runs are skipped
#
# A run appears under results/toy/ only when it is complete; its logs are committed, its model is not.
set -euo pipefail
cd "$(dirname "$0")/.."
for seed in 0 1 2; do
  for s in 1 10 100 inf; do
    out=results/toy/dpo-s$s-seed$seed
    if [ -d "$out" ]; then continue; fi
    rm -rf "$out.partial"
    python train_dpo.py --sync-steps "$s" --seed "$seed" --steps 400 --out "$out.partial"
    mv "$out.partial" "$out"
  done
done
