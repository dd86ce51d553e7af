#!/usr/bin/env bash
# The paper's experiments on the toy, three seeds each, two runs at a time on a core each (the toy is too small
# to use two cores well).
#
#     bash results/paper_on_a_laptop.sh              # two and a half hours on two free CPU cores; finished runs are skipped
#     bash results/paper_on_a_laptop.sh chats/       # only the runs whose name has this in it
#     bash results/paper_on_a_laptop.sh --list       # prints name and command of each run
#     bash results/paper_on_a_laptop.sh --check      # says which logs are older than the maths
#
# A run works in runs/laptop/NAME. When it is complete its args.json and metrics.jsonl (means of ten steps) appear as
# results/NAME. A run that fails says so, and the others go on.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

sums() { # name, what python runs, flags: the toy's own task, with a verifier
  echo "toy/$1-seed$seed ${*:2} --seed $seed"
}

chats() { # the same: the open-ended task, with a reward model
  local files="--data toy/chat_train.jsonl --eval-data toy/chat_valid.jsonl"
  echo "chats/$1-seed$seed ${*:2} --steps 300 --reward-model toy/reward_model $files --seed $seed"
}

both() { # the same: DPO, validated on both tasks
  local files="--eval-data toy/valid.jsonl toy/chat_valid.jsonl"
  echo "mixed/$1-seed$seed train_dpo.py --sync-steps 10 --eval-every 100 --reward-model toy/reward_model $files" \
    "${*:2} --seed $seed"
}

kl() { # script (dpo or grpo), s: a run of each task whose validations measure how far the policy has moved
  local run="-m results.kl $1 --steps 300 --sync-steps $2 --seed $seed"
  local files="--data toy/chat_train.jsonl --eval-data toy/chat_valid.jsonl"
  echo "kl/sums-$1-s$2-seed$seed $run"
  echo "kl/chats-$1-s$2-seed$seed $run --reward-model toy/reward_model $files"
}

first() { # what needs no other run; seed 0 of all before seed 1
  for seed in 0 1 2; do
    # Table 1: the dial
    for s in 1 10; do sums grpo-s$s train_grpo.py --steps 400 --sync-steps $s; done
    for s in 1 10 100 inf; do sums dpo-s$s train_dpo.py --steps 400 --sync-steps $s; done
    for beta in 0.1 1; do sums dpo-s100-beta$beta train_dpo.py --steps 400 --sync-steps 100 --beta $beta; done
    # Table 3: both tasks
    both sums --data toy/train.jsonl
    both chats --data toy/chat_train.jsonl
    both both --data toy/train.jsonl toy/chat_train.jsonl --data-weights 1 1
    # Table 2: the open-ended task
    for s in 1 5 10 100 inf; do chats dpo-s$s train_dpo.py --sync-steps $s; done
    chats grpo-s1 train_grpo.py --sync-steps 1
    # beyond the paper: GRPO with old completions
    for s in 100 inf; do sums grpo-s$s train_grpo.py --steps 400 --sync-steps $s; done
    # section 5: the reference fixed, also with the paper's beta
    for s in 1 10 100; do sums dpo-s$s-fixed train_dpo.py --steps 300 --sync-steps $s --no-sync-ref; done
    for s in 1 10; do
      sums dpo-s$s-fixed-beta0.1 train_dpo.py --steps 300 --sync-steps $s --no-sync-ref --beta 0.1
    done
    # Table 5: the group
    for n in 4 12; do sums grpo-s1-n$n train_grpo.py --steps 300 --sync-steps 1 --samples-per-prompt $n; done
    # appendix B.2 and section 5: GroupDPO, NLL, Adam's epsilon, length normalisation, DPO + GRPO
    sums dpo-s1-allpairs train_dpo.py --steps 300 --sync-steps 1 --all-pairs
    for s in 1 inf; do sums dpo-s$s-nll train_dpo.py --steps 300 --sync-steps $s --nll-weight 1; done
    sums dpo-s1-eps1e-4 train_dpo.py --steps 300 --sync-steps 1 --adam-eps 1e-4
    sums dpo-s100-beta0.1-eps1e-4 train_dpo.py --steps 300 --sync-steps 100 --beta 0.1 --adam-eps 1e-4
    sums dpo-s1-lengthnorm train_dpo.py --steps 300 --sync-steps 1 --length-normalize
    sums grpo-s1-seqnorm train_grpo.py --steps 300 --sync-steps 1 --loss-norm seq
    for w in 0.01 0.001; do
      sums dpo-s1-grpo$w -m teaching.dpo_grpo --steps 300 --sync-steps 1 --grpo-weight $w
    done
    # the paper's Table 4 for chats: a fixed reference and beta = 0.01
    for s in 1 10 100 inf; do
      chats dpo-s$s-fixed-beta0.01 train_dpo.py --sync-steps $s --no-sync-ref --beta 0.01
    done
    # Fig. 6: the entropy bonus at the paper's scales, and at one that can be seen
    for w in 5e-4 0.5 5 1e-4 2e-4 3e-4; do
      sums dpo-s1-entropy$w train_dpo.py --steps 300 --sync-steps 1 --entropy-weight $w
    done
    # beyond the paper: GRPO with old completions, without clip, and without the ratio to the sampler
    for s in 10 100 inf; do
      sums grpo-s$s-noratio -m results.no_ratio --steps 400 --sync-steps $s
      sums grpo-s$s-noclip train_grpo.py --steps 400 --sync-steps $s --clip-low 0.999 --clip-high 999 --is-cap 1000
    done
    # dynamics: KL to the start
    for s in 1 10 100 inf; do kl dpo $s; done
    kl grpo 1
  done
}

second() { # goes on from models of `first`; a model that is named is trained with the paper's values, so here the toy's
  local toy="--prompts-per-step 32 --max-prompt-tokens 24 --max-new-tokens 8 --micro-batch-tokens 4096 --lr 2e-4"
  toy="$toy --adam-eps 1e-8 --grad-clip 1 --beta 3 --no-activation-checkpointing"
  for seed in 0 1 2; do
    both sums-then-chats --model runs/laptop/mixed/sums-seed$seed/model $toy --data toy/chat_train.jsonl
    both chats-then-sums --model runs/laptop/mixed/chats-seed$seed/model $toy --data toy/train.jsonl
  done
}

run() { # name, what python runs
  local out=runs/laptop/$1
  if [ -d "results/$1" ]; then return; fi
  rm -rf "$out" "results/$1.partial"
  mkdir -p "$(dirname "$out")"
  if python "${@:2}" --log-samples 0 --save-every 0 --out "$out" >"$out.log" 2>&1 \
    && python results/logs.py thin "$out" "results/$1.partial" && mv "results/$1.partial" "results/$1"; then
    echo "$1 done"
  else
    echo "$1 FAILED, see $out.log"
    return 1
  fi
}
export -f run

case "${1:-}" in
  --check) exec python results/logs.py check ;;
  --list) first && second && exit ;;
esac
status=0
for stage in first second; do
  $stage | { grep -F -- "${1:-seed}" || true; } | xargs -r -P 2 -L 1 bash -c 'run "$@"' run || status=1
done
exit $status
