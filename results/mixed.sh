#!/usr/bin/env bash
# The paper's third experiment on the toy: sums (verifiable), chats (a reward model), both in one run, and one after
# the other; DPO with s = 10, 300 steps each, three seeds, always evaluated on both kinds.
#
#     bash results/mixed.sh              # 22 minutes on 2 CPU cores; finished runs are skipped
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

run() { # name, flags
  local out=results/mixed/$1
  if [ -d "$out" ]; then return; fi
  rm -rf "$out.partial"
  if ! python train_dpo.py --sync-steps 10 --eval-every 100 --log-samples 0 --reward-model toy/reward_model \
    --eval-data toy/valid.jsonl toy/chat_valid.jsonl --out "$out.partial" $2 >"$out.log" 2>&1; then
    echo "$1 failed, see $out.log"
    return 255
  fi
  rm -rf "$out.partial/checkpoints" "$out.log"
  mv "$out.partial" "$out"
  echo "$1 done"
}
export -f run

sums="--data toy/train.jsonl" chats="--data toy/chat_train.jsonl"
# a model that is named is trained with the paper's values: these are the toy's
toy="--prompts-per-step 32 --max-prompt-tokens 24 --max-new-tokens 8 --micro-batch-tokens 4096 --lr 2e-4"
toy="$toy --adam-eps 1e-8 --grad-clip 1 --beta 3 --no-activation-checkpointing"
mkdir -p results/mixed
for seed in 0 1 2; do
  echo "sums-seed$seed $sums --seed $seed"
  echo "chats-seed$seed $chats --seed $seed"
  echo "both-seed$seed $sums toy/chat_train.jsonl --data-weights 1 1 --seed $seed"
done | xargs -P 2 -I{} bash -c 'read -r name flags <<<"{}"; run "$name" "$flags"'
for seed in 0 1 2; do
  echo "sums-then-chats-seed$seed --model results/mixed/sums-seed$seed/model $toy $chats --seed $seed"
  echo "chats-then-sums-seed$seed --model results/mixed/chats-seed$seed/model $toy $sums --seed $seed"
done | xargs -P 2 -I{} bash -c 'read -r name flags <<<"{}"; run "$name" "$flags"'
