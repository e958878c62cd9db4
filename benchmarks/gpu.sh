#!/usr/bin/env bash
# Everything that a GPU is to show, in less than eight minutes: is every kernel right, does every stage learn in bfloat16
# what it learns in float32, and how fast are training, decoding, rollouts and serving.
#
#     bash benchmarks/gpu.sh [--dry] [--out DIR]
#
# Each measurement is appended to DIR/results.jsonl as it is made, so a run that is cut off keeps what it has; what a part
# prints is in DIR/logs. A part that fails does not stop the others, but the exit status is 1 in the end. --dry does the
# same on a CPU with tiny shapes. PYTHON names the interpreter, BUDGET the seconds that all parts have together.
set -uo pipefail
cd "$(dirname "$0")/.."

DRY=""
OUT=out/gpu
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) DRY=1 ;;
    --out) OUT="${2:?--out needs a folder}"; shift ;;
    *) echo "usage: bash benchmarks/gpu.sh [--dry] [--out DIR]; $1 is unknown" >&2; exit 2 ;;
  esac
  shift
done
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
case "$OUT" in /*) ;; *) OUT="$PWD/$OUT" ;; esac
BUDGET="${BUDGET:-$([ -n "$DRY" ] && echo 1800 || echo 470)}"
RESULTS="$OUT/results.jsonl"
REPORT="$OUT/report.txt"
mkdir -p "$OUT/logs"
: >"$RESULTS"
: >"$REPORT"

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$OUT/compiled}" MINILLM_CACHE="$OUT/tokens"
if [ -n "$DRY" ]; then
  # Tiny programs run once, so compiling them is nearly all the time there is.
  export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
fi

# report NAME SECONDS STATE: a line of the table at the end.
report() { printf '%-22s %5s s    %s\n' "$1" "$2" "$3" >>"$REPORT"; }

# part NAME SECONDS COMMAND…: run a part, for no longer than SECONDS and what is left of the budget.
part() {
  local name="$1" limit="$2" left=$((BUDGET - SECONDS)) began="$SECONDS" status log="$OUT/logs/$1.log" state
  shift 2
  if [ "$left" -lt 5 ]; then
    report "$name" - "FAILED: not run, the budget of $BUDGET s was used up"
    return 1
  fi
  [ "$limit" -lt "$left" ] || limit="$left"
  printf '[%3d s] %s …\n' "$SECONDS" "$name"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$log" 2>&1 </dev/null
  status=$?
  case "$status" in
    0) state=ok ;;
    124 | 137) state="FAILED: cut off after $limit s" ;;
    *) state="FAILED with status $status" ;;
  esac
  if [ "$status" != 0 ]; then
    sed 's/^/    | /' "$log" | tail -n 25 | cut -c1-400
  fi
  printf '[%3d s] %s: %s, %d s\n' "$SECONDS" "$name" "$state" $((SECONDS - began))
  report "$name" $((SECONDS - began)) "$state"
  return "$status"
}

skip() {
  printf '[%3d s] %s: skipped, %s\n' "$SECONDS" "$1" "$2"
  report "$1" - "skipped: $2"
}

# bench NAME SECONDS MODULE FLAGS…: a benchmark that appends its lines itself.
bench() {
  local name="$1" limit="$2" module="$3"
  shift 3
  part "$name" "$limit" "$PYTHON" -m "benchmarks.$module" "$@" --append "$RESULTS"
}

can() { "$PYTHON" -c "$1" >/dev/null 2>&1; }

if [ -n "$DRY" ]; then
  # Nothing is timed in earnest, so both halves may run at once.
  bench stages 1500 stages --size tiny --out_dir "$OUT/stages" &
  bench kernels 600 kernels --length 160 --heads 4 --head_dim 16 --rows 96 --hidden 16 --width 24 --repeats 0
  tiny=(--preset tiny --hidden_size 32 --vocab_size 256)
  bench train 300 train "${tiny[@]}" --batch_size 2 --max_seq_len 32 --steps 2 --warmup 1
  bench train_moe 300 train "${tiny[@]}" --use_moe --batch_size 2 --max_seq_len 32 --steps 2 --warmup 1
  bench decode 300 decode "${tiny[@]}" --batch_sizes 1 2 --prompt_len 8 --chunks 1 --prefills 1
  bench rollout 300 rollout "${tiny[@]}" --completions 4 --prompt_len 8 --max_new_tokens 8 --rounds 1 --one_by_one 2
  bench serve 600 serve "${tiny[@]}" --vocab_size 512 --clients 2 --min_requests 2 --prompt_tokens 8 16 --max_tokens 8 \
    --rounds 1 --no_baseline --slots 2 --context 64
  if can 'import torch'; then
    bench torch 300 torch_baseline --preset tiny --batch_size 2 --seq_len 32 --steps 2 --warmup 1
  else
    skip torch "PyTorch is not installed here"
  fi
  wait
else
  if ! part device 90 "$PYTHON" -c 'import json, jax; assert jax.default_backend() == "gpu", jax.devices()
from benchmarks.common import machine; print(json.dumps(machine()))'; then
    echo "JAX finds no GPU; install it with CUDA (pip install 'minillm-jax[cuda13]'), or try --dry" >&2
    exit 1
  fi
  tail -n 1 "$OUT/logs/device.log"
  rows=(--batch_size 64 --max_seq_len 512 --steps 20 --warmup 3)
  bench kernels 110 kernels
  bench train_minillm 45 train --preset minillm "${rows[@]}"
  bench decode 60 decode --preset minillm --batch_sizes 1 16 64 256
  bench rollout 45 rollout --completions 256 --prompt_len 64 --max_new_tokens 128 --one_by_one 4
  bench stages 210 stages --out_dir "$OUT/stages"
  if can 'import torch; assert torch.cuda.is_available()'; then
    peer=(--preset minillm --batch_size 64 --seq_len 512 --steps 20 --warmup 5)
    bench torch 45 torch_baseline "${peer[@]}"
    bench torch_compiled 60 torch_baseline "${peer[@]}" --compile
  else
    skip torch "no PyTorch with CUDA here"
  fi
  bench train_moe 45 train --preset minimind3_moe "${rows[@]}"
  bench train_minimind3 45 train --preset minimind3 "${rows[@]}"
  bench decode_bfloat16 45 decode --preset minimind3 --weights bfloat16 --batch_sizes 1 64
  # The server and the engine that it is compared with hold a share of the memory each.
  XLA_PYTHON_CLIENT_MEM_FRACTION=.35 \
    bench serve 80 serve --preset minillm --clients 1 16 64 --rounds 1 --no_baseline
fi

report total "$SECONDS" ""
echo "parts:"
cat "$REPORT"
"$PYTHON" -m benchmarks.summary "$RESULTS" | tee "$OUT/summary.md"
echo "results: $RESULTS   what each part printed: $OUT/logs"
! grep -q " FAILED" "$REPORT"
