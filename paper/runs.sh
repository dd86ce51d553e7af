#!/usr/bin/env bash
# The paper's runs, a name for each: data, Tables 1, 2, 3 and 5, its ablations, and their evaluation.
#
#     bash paper/runs.sh                   # the list, with the paper's numbers
#     bash paper/runs.sh --print t1-s100   # the command
#     bash paper/runs.sh t1-s100           # run it; given again, it goes on
#     bash paper/runs.sh maths-of-t1-s100  # evaluate it on maths; chat-of-t2-s1: on chat; maths-of-seed: before training
#
# For a node of eight 80 GB GPUs; another launcher: NODE="torchrun --nproc-per-node 4" bash paper/runs.sh ...
# None of them has been run by this project. What the paper leaves open, and what stands here instead: GUIDE.md.
set -euo pipefail
cd "$(dirname "$0")/.."
NODE=${NODE:-torchrun --nproc-per-node 8}

# ---- settings (the paper's Table 4, and what both scripts have as defaults spelled out)
LLAMA="--model meta-llama/Llama-3.1-8B-Instruct"
ALL="--max-prompt-tokens 1024 --samples-per-prompt 8 --temperature 1.0 --lr 1e-6 --grad-clip 0.1 --eval-every 100"
ATHENE="--reward-model Nexusflow/Athene-RM-8B --reward-offload"
MATHS="$ALL --data datasets/numinamath/train.jsonl --eval-data datasets/numinamath/valid.jsonl \
  --max-new-tokens 2048 --prompts-per-step 64 --steps 1000"
CHAT="$ALL $ATHENE --data datasets/wildchat/train.jsonl --eval-data datasets/wildchat/valid.jsonl \
  --max-new-tokens 1024 --prompts-per-step 32 --steps 1500"
BOTH="$ALL $ATHENE --data datasets/numinamath-100k/train.jsonl datasets/wildchat-50k/train.jsonl \
  --eval-data datasets/numinamath/valid.jsonl datasets/wildchat/valid.jsonl \
  --max-new-tokens 1024 --prompts-per-step 32 --steps 1500"
FOLLOWING="--beta 0.1 --adam-eps 1e-4 --sync-ref" # DPO on maths: the reference follows the sampler
FIXED="--beta 0.01 --adam-eps 1e-8 --no-sync-ref" # DPO elsewhere
GRPO="--beta 0.001 --no-std-norm --loss-norm sum --sync-steps 1"
DPO_MATHS="$NODE train_dpo.py $LLAMA $MATHS $FOLLOWING"
GRPO_MATHS="$NODE train_grpo.py $LLAMA $MATHS $GRPO"
DPO_CHAT="$NODE train_dpo.py $LLAMA $CHAT $FIXED"
TEST_MATHS="--data datasets/math500/test.jsonl datasets/numinamath/test.jsonl datasets/amc23/test.jsonl \
  --max-prompt-tokens 1024 --max-new-tokens 2048"
TEST_CHAT="--data datasets/alpaca_eval/test.jsonl arena_hard.jsonl --max-prompt-tokens 16384 --max-new-tokens 1024"

# ---- name | the paper's numbers | command
runs() {
  cat <<END
# data: NuminaMath, WildChat, and larger parts of both for Table 3; alpaca_eval.json is AlpacaEval's own file
data-numinamath | 261,440 problems, 2 x 1,980 held out | python paper/prepare.py numinamath
data-wildchat | 1,000 prompts | python paper/prepare.py wildchat
data-numinamath-100k | 100,000 problems | python paper/prepare.py numinamath --train 100000 --out datasets/numinamath-100k
data-wildchat-50k | 50,000 prompts | python paper/prepare.py wildchat --train 50000 --out datasets/wildchat-50k
data-math500 | 500 problems | python paper/prepare.py math500
data-amc23 | 40 problems | python paper/prepare.py amc23
data-alpaca_eval | 805 prompts | python paper/prepare.py alpaca_eval --source alpaca_eval.json
# Table 1, maths: Math500 / NuminaMath / AMC23; before training 47.4 / 33.9 / 23.7
t1-offline | 53.7 / 36.4 / 28.8 | $DPO_MATHS --sync-steps inf
t1-s100 | 58.9 / 39.3 / 35.1 | $DPO_MATHS --sync-steps 100
t1-s10 | 57.2 / 39.4 / 31.4 | $DPO_MATHS --sync-steps 10
t1-s1 | 58.7 / 39.6 / 32.9 | $DPO_MATHS --sync-steps 1
t1-grpo | 58.1 / 38.8 / 33.6 | $GRPO_MATHS
# Table 5, the group of GRPO (of 8: t1-grpo)
t5-4 | 55.7 / 37.7 / 30.6 | $GRPO_MATHS --samples-per-prompt 4
t5-12 | 57.6 / 38.4 / 32.2 | $GRPO_MATHS --samples-per-prompt 12
# Table 2, chat: AlpacaEval 2 LC / Arena-Hard; before training 27.3 / 21.3
t2-offline | 53.2 / 38.3 | $DPO_CHAT --sync-steps inf
t2-s100 | too unstable | $DPO_CHAT --sync-steps 100
t2-s10 | 81.6 / 59.4 | $DPO_CHAT --sync-steps 10
t2-s5 | 78.7 / 60.7 | $DPO_CHAT --sync-steps 5
t2-s1 | 83.1 / 60.1 | $DPO_CHAT --sync-steps 1
t2-grpo | 75.2 / 55.0 | $NODE train_grpo.py $LLAMA $CHAT $GRPO
# Table 3, both kinds: Math500 / AMC23 / AlpacaEval 2 LC / Arena-Hard (one kind alone: t1-s1, t2-s1)
t3-both | 50.2 / 22.3 / 71.0 / 57.7 | $NODE train_dpo.py $LLAMA $BOTH $FIXED --sync-steps 1
t3-chat-then-maths | 53.4 / 25.3 / 82.2 / 69.0 | $NODE train_dpo.py --model runs/t2-s1/model $MATHS $FOLLOWING --sync-steps 1
# ablations, on t1-s1 or t1-grpo: what the paper says of them
ab-fixed-reference | lengths collapse, reward falls (figures 2, 9) | $DPO_MATHS --sync-steps 1 --no-sync-ref
ab-adam-eps | often diverges | $DPO_MATHS --sync-steps 1 --adam-eps 1e-8
ab-all-pairs | GroupDPO: no substantial change (figure 8) | $DPO_MATHS --sync-steps 1 --all-pairs --micro-batch-tokens 24576
ab-nll | no benefit (figure 10) | $DPO_MATHS --sync-steps 1 --nll-weight 1
ab-entropy-1e-4 | entropy falls all the same (figure 6) | $DPO_MATHS --sync-steps 1 --entropy-weight 1e-4
ab-entropy-2e-4 | | $DPO_MATHS --sync-steps 1 --entropy-weight 2e-4
ab-entropy-3e-4 | | $DPO_MATHS --sync-steps 1 --entropy-weight 3e-4
ab-entropy-5e-4 | | $DPO_MATHS --sync-steps 1 --entropy-weight 5e-4
ab-grpo-beside-1e-2 | DPO + GRPO: no substantial difference (B.2) | $NODE -m teaching.dpo_grpo $LLAMA $MATHS $FOLLOWING --sync-steps 1 --grpo-weight 0.01 --micro-batch-tokens 24576
ab-grpo-beside-1e-3 | | $NODE -m teaching.dpo_grpo $LLAMA $MATHS $FOLLOWING --sync-steps 1 --grpo-weight 0.001 --micro-batch-tokens 24576
ab-grpo-length | mean over tokens: less stable (5.1) | $GRPO_MATHS --loss-norm seq
END
}

# ---- what is asked for
fail() {
  echo "runs.sh: error: $1" >&2
  exit 2
}

look_up() { # sets `command` to what stands in the row of a name
  local name numbers
  while IFS="|" read -r name numbers command; do
    if [ "$name" = "$1 " ]; then return; fi
  done < <(runs)
  fail "$1: no such run; without arguments the list is printed"
}

compose() { # sets `command` to all that a name stands for
  local run=${1#maths-of-} model
  run=${run#chat-of-}
  case $1 in
    maths-of-seed | chat-of-seed) model=$LLAMA ;;
    *) look_up "$run" && model="--model runs/$run" ;;
  esac
  case $1 in
    maths-of-*) command="$NODE evaluate.py $model $TEST_MATHS --out runs/$1" ;;
    chat-of-*) command="$NODE evaluate.py $model $TEST_CHAT --out runs/$1" ;;
    data-*) ;;
    *) command="$command --out runs/$1 --resume auto" ;;
  esac
}

check_files() { # what a run reads, another has to write first
  local previous= word writer
  for word in $command; do
    writer=$(cut -d / -f 2 <<<"$word")
    case "$previous $word" in
      *" datasets/"*.jsonl) writer=data-$writer ;;
      "--model runs/"*) ;;
      *) writer= ;;
    esac
    if [ -n "$writer" ] && [ ! -e "$word" ]; then fail "$1 reads $word: bash paper/runs.sh $writer"; fi
    previous=$word
  done
}

case ${1:-} in
  "")
    runs | awk -F ' *[|] ' '/^#/ { print "\n" $0; next } { printf "  %-22s %s\n", $1, $2 }'
    echo && sed -n 's/^#     /  /p' "$0" ;;
  --print)
    compose "${2:-}"
    echo $command ;;
  *)
    compose "$1"
    check_files "$1"
    echo $command
    exec $command ;;
esac
