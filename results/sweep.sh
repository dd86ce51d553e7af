#!/usr/bin/env bash
# The runs behind the figures and tables of the toy: 400 steps, three seeds each.
#
#     bash results/sweep.sh              # 20 minutes on 2 CPU cores; finished runs are skipped
#
# Two runs at a time, on a core each: the toy is too small to use two cores well. A run appears under results/toy/
# only when it is complete; its logs are committed, its model is not.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

run() { # name, script, flags
  local out=results/toy/$1
  if [ -d "$out" ]; then return; fi
  rm -rf "$out.partial"
  if ! python "$2" --steps 400 --log-samples 0 --out "$out.partial" ${3:-} >"$out.log" 2>&1; then
    echo "$1 failed, see $out.log"
    return 255
  fi
  rm -rf "$out.partial/model" "$out.partial/checkpoints" "$out.log"
  mv "$out.partial" "$out"
  echo "$1 done"
}
export -f run

mkdir -p results/toy
for seed in 0 1 2; do
  for s in 1 10; do echo "grpo-s$s-seed$seed train_grpo.py --sync-steps $s --seed $seed"; done
  for s in 1 10 100 inf; do echo "dpo-s$s-seed$seed train_dpo.py --sync-steps $s --seed $seed"; done
  for beta in 0.1 1; do echo "dpo-s100-beta$beta-seed$seed train_dpo.py --sync-steps 100 --beta $beta --seed $seed"; done
done | xargs -P 2 -I{} bash -c 'read -r name script flags <<<"{}"; run "$name" "$script" "$flags"'
