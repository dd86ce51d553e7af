#!/usr/bin/env bash
# The dial on one GPU: an instruct model on GSM8K, DPO with s = 1, 10, 100 and inf, and how good each is.
#
#     bash paper/one_gpu.sh            # Qwen2.5-1.5B-Instruct, a GPU of 80 GB
#     bash paper/one_gpu.sh --small    # Qwen2.5-0.5B-Instruct, a GPU of 24 GB with bfloat16
#     bash paper/one_gpu.sh --print    # the commands only (also --small --print)
#
# NOT YET RUN, on no GPU. Given again it goes on where it stopped; what is finished is skipped.
#
# Settings: the paper's for maths (both scripts' defaults: beta 0.1, learning rate 1e-6, reference following), with
# shorter completions, 300 steps of 64 prompts, and GSM8K's own test set at the end (4 completions each).
#
# Memory, derived and not measured (the first number is the training's peak, the second the sampler's weights):
#     python results/memory.py --shard-ranks 1 --shape 1536,28,12,2,8960,151936,1  # 33.9 and 2.9 GiB
#     python results/memory.py --shard-ranks 1 --shape 896,24,14,2,4864,151936,1 --micro-batch-tokens 8192  # 12.8 and 0.9 GiB
#
# Time, not measured: a step samples 512 completions and trains on at most 128 of them, at most 131,072 tokens,
# which is 8 x 1.5e9 x 131,072 = 1.6e15 operations (0.5e15 for the small one), the reference's forward a quarter more.
# The progress bar shows the seconds of a step; time/sample and time/update in metrics.jsonl say where they go.
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL="Qwen/Qwen2.5-1.5B-Instruct"
FITS="--micro-batch-tokens 16384 --gpu-memory 0.5"
OUT=runs/one-gpu
print=
for flag in "$@"; do
  case $flag in
    --small)
      MODEL="Qwen/Qwen2.5-0.5B-Instruct"
      FITS="--micro-batch-tokens 8192 --gpu-memory 0.4"
      OUT=runs/one-gpu-small ;;
    --print) print=yes ;;
    *)
      echo "one_gpu.sh: error: $flag: the flags are --small and --print" >&2
      exit 2 ;;
  esac
done
LENGTHS="--max-prompt-tokens 512 --max-new-tokens 512"
ROWS="--data datasets/gsm8k-train/train.jsonl --eval-data datasets/gsm8k-train/valid.jsonl"
TEST="--data datasets/gsm8k/test.jsonl --samples 4 --pass-k 1 4 --gpu-memory 0.8"

unless() { # a file that shows that it is done, and the command that makes it
  if [ -n "$print" ]; then
    echo "${*:2}"
  elif [ ! -e "$1" ]; then
    echo "${*:2}"
    "${@:2}"
  fi
}

for name in gsm8k-train gsm8k; do
  unless datasets/$name/manifest.json python paper/prepare.py $name
done
unless $OUT/before/results.json torchrun evaluate.py --model $MODEL $TEST $LENGTHS --out $OUT/before
for s in 1 10 100 inf; do
  unless $OUT/s$s/model torchrun train_dpo.py --model $MODEL --sync-steps $s $ROWS $LENGTHS $FITS \
    --prompts-per-step 64 --steps 300 --out $OUT/s$s --resume auto
  unless $OUT/s$s-test/results.json torchrun evaluate.py --model $OUT/s$s $TEST --out $OUT/s$s-test
done
unless $OUT/curves.png python results/plot.py $OUT/s1 $OUT/s10 $OUT/s100 $OUT/sinf --out $OUT/curves.png
