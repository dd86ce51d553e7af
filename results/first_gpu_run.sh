#!/usr/bin/env bash
# The first run on a GPU, in the order c, e, b, d, a, which is from minutes to most of an hour, and its report,
# results/gpu.md. It needs an activated environment with requirements.txt, and a C compiler and Python's headers,
# with which Triton builds its kernels; no network.
#
#     bash results/first_gpu_run.sh            # all parts; given again it goes on where it stopped
#     bash results/first_gpu_run.sh b c        # these parts
#     bash results/first_gpu_run.sh --smoke    # the logic on a CPU, with tiny models: runs/first-gpu-smoke/gpu.md
#
# a  the tests, on GPUs and on CPUs
# b  the toy with vLLM: s = 1, 10 and inf, and a run that is stopped by SIGTERM and resumed
# c  a random Qwen2 of 0.5B (biases, tied matrices, more rows than ids): log-probs after 20 reloads, both algorithms
# d  speed and memory at 0.5B and 1.5B, shared and plain rows, and vLLM alone
# e  what --preflight forecasts for a run of part d
#
# NOT YET RUN on a GPU. A step that fails is named in the report, and the others go on.
set -uo pipefail
cd "$(dirname "$0")/.."

out=runs/first-gpu REPORT=results/gpu.md TESTS="-n 4 --dist loadfile" failed=0
SMALL=896,24,14,2,4864,151936 LARGE=1536,28,12,2,8960,151936 # Qwen2.5 0.5B and 1.5B
RELOADS=20 TOY="--steps 100 --gpu-memory 0.1" LENGTHS="--max-prompt-tokens 512 --max-new-tokens 512" TOKENS="512 512"
SPEED="--steps 6 --prompts-per-step 64 --micro-batch-tokens 16384 --gpu-memory 0.5"
ALONE="128 8" # prompts and samples, as many as two steps of SPEED have
parts=
for argument in "$@"; do
  case $argument in
    --smoke)
      out=runs/first-gpu-smoke REPORT= TESTS=tests/test_maths.py
      SMALL=64,2,2,1,128,400 LARGE=96,2,3,1,128,400
      RELOADS=3 TOY="--steps 12" LENGTHS="--max-prompt-tokens 8 --max-new-tokens 8" TOKENS="8 8"
      SPEED="--steps 3 --prompts-per-step 8 --micro-batch-tokens 256"
      ALONE="8 8" ;;
    a | b | c | d | e) parts+=$argument ;;
    *)
      echo "first_gpu_run.sh: error: $argument: neither --smoke nor a part (a, b, c, d, e)" >&2
      exit 2 ;;
  esac
done
parts=${parts:-abcde}
OUT=${OUT:-$out} # OUT=DIRECTORY bash ... keeps its runs and logs there
mkdir -p "$OUT"

step() { # name, command: runs it unless it is done, keeps what it printed, and how long it took
  local began=$SECONDS log=$OUT/$1.log
  if [ -e "$OUT/$1.done" ]; then return; fi
  rm -rf "${OUT:?}/$1"
  echo "$1: ${*:2}"
  echo "\$ ${*:2}" >"$log"
  if "${@:2}" >>"$log" 2>&1; then
    echo $((SECONDS - began)) >"$OUT/$1.done"
    rm -rf "${OUT:?}/$1/checkpoints" "${OUT:?}/$1/model" # tens of GB otherwise
  else
    echo "$1 failed, see $log"
    failed=1
  fi
}

stopped_and_resumed() { # directory, command: SIGTERM after the fifth step must end it with exit code 75
  "${@:2}" --out "$1" &
  local run=$!
  until [ "$(grep -c '"loss"' "$1/metrics.jsonl" 2>/dev/null)" -ge 5 ] 2>/dev/null; do
    kill -0 $run 2>/dev/null || return 1
    sleep 0.2
  done
  kill -TERM $run
  wait $run
  [ $? = 75 ] && "${@:2}" --out "$1" --resume auto
}

if [[ $parts == *[cde]* ]]; then
  step small python results/gpu.py model $OUT/small $SMALL $TOKENS
fi
if [[ $parts == *c* ]]; then
  for algorithm in dpo grpo; do
    step reloads-$algorithm python -m results.gpu $algorithm --model $OUT/small --data $OUT/small/rows.jsonl $LENGTHS \
      --steps $RELOADS --prompts-per-step 8 --micro-batch-tokens 8192 --lr 1e-4 --out $OUT/reloads-$algorithm
  done
fi

if [[ $parts == *[de]* ]]; then
  step large python results/gpu.py model $OUT/large $LARGE $TOKENS
  run="python -m results.gpu grpo $LENGTHS $SPEED --sync-steps 2 --save-every 3 --keep 1"
fi
if [[ $parts == *e* ]]; then
  step large-packing $run --model $OUT/large --data $OUT/large/rows.jsonl --packing --out $OUT/large-packing
  step preflight $run --model $OUT/large --data $OUT/large/rows.jsonl --packing --out $OUT/preflight --preflight
fi

if [[ $parts == *b* ]]; then
  export VLLM_LOGGING_LEVEL=INFO
  for s in 1 10 inf; do
    step toy-s$s python train_dpo.py --sync-steps $s $TOY --out $OUT/toy-s$s
  done
  step toy-stopped stopped_and_resumed $OUT/toy-stopped python train_dpo.py --sync-steps 10 $TOY
  unset VLLM_LOGGING_LEVEL
fi

if [[ $parts == *d* ]]; then
  for size in small large; do
    for rows in packing no-packing; do
      step $size-$rows $run --model $OUT/$size --data $OUT/$size/rows.jsonl --$rows --out $OUT/$size-$rows
    done
    step $size-alone python results/gpu.py alone $OUT/$size $ALONE $TOKENS
  done
fi

if [[ $parts == *a* ]]; then
  step tests python -m pytest -p no:cacheprovider $TESTS
fi

python results/gpu.py report "$OUT" "${REPORT:-$OUT/gpu.md}" || failed=1
exit $failed
