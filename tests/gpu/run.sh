#!/usr/bin/env bash
# All that a GPU is needed for, in under 8 minutes: bash tests/gpu/run.sh [OUT_DIR]
#
# Correctness (tests, compute-sanitizer), then measurements (traffic, benchmark, a distillation step). What fails does
# not stop the rest. In OUT_DIR (else $OUT, else benchmarks/results): run.log with everything, summary.json, traffic.json,
# bench.json, step.json. Exit status 0 only where every check of correctness that could run has passed.
# PYTHON names another interpreter than python3; it needs torch with CUDA, cuda-bindings, NVRTC and pytest.
set -u
cd "$(dirname "$0")/../.." || exit 2
python=${PYTHON:-python3}
out=${1:-${OUT:-benchmarks/results}}
total=470 # seconds
mkdir -p "$out" || exit 2
log=$out/run.log
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD:$PWD/tests/compress/kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
export EDGESTILL_CACHE=${EDGESTILL_CACHE:-$work/cache} # each source is compiled once for all parts
unset EDGESTILL_KERNELS
: >"$log"

"$python" -c 'import torch; assert torch.cuda.is_available()' 2>>"$log" || {
  echo "error: $python has no torch that sees an NVIDIA GPU" | tee -a "$log" >&2
  exit 1
}
{
  "$python" -c 'import sys, torch; print(f"python {sys.version.split()[0]}, torch {torch.__version__}, {torch.cuda.get_device_name()}")'
  nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw --format=csv,noheader
} 2>&1 | tee -a "$log"

left() { # seconds, when $1 are kept for later parts; 15 at least, since `timeout` takes 0 for no limit
  local seconds=$((total - SECONDS - ${1:-0}))
  echo $((seconds > 15 ? seconds : 15))
}
names=() statuses=() durations=()

# part NAME LINES COMMAND...: run it, everything into the log, the last LINES of it shown
part() {
  local name=$1 lines=$2 start=$SECONDS from
  shift 2
  from=$(($(wc -c <"$log") + 1))
  echo "== $name"
  "$@" >>"$log" 2>&1
  statuses+=($?) names+=("$name") durations+=($((SECONDS - start)))
  tail -c "+$from" "$log" | awk '/^-- in short$/ { text = ""; next } { text = text $0 "\n" } END { printf "%s", text }' |
    tail -n "$lines"
  echo "== $name: status ${statuses[-1]}, ${durations[-1]} s" | tee -a "$log"
}

tests() { # NAME: of a loss, or `rest`. Each in a process of its own, since after a fault a process can do no more
  local which=$1
  [ "$which" = rest ] && which="not (weighted_mse or adapter_mse or cwd or pkd or fgd)"
  CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout -k 5 130 \
    "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_on_gpu.py -k "$which" >"$work/$1" 2>&1
}

correctness() {
  local name failed=0 processes=() all=(weighted_mse adapter_mse cwd pkd fgd rest)
  for name in "${all[@]}"; do
    tests "$name" &
    processes+=($!)
  done
  for name in "${!all[@]}"; do
    wait "${processes[$name]}" || failed=1
  done
  for name in "${all[@]}"; do cat "$work/$name"; done
  echo "-- in short"
  for name in "${all[@]}"; do grep -E '^(FAILED|ERROR|largest)' "$work/$name" | cut -c -200; done | head -n 60
  for name in "${all[@]}"; do echo "$name: $(tail -n 1 "$work/$name")"; done
  return $failed
}

sanitizer() { # TOOL. Status 9: it found something
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here"; return 127; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 45 \
    compute-sanitizer --tool "$1" --error-exitcode 9 "$python" tests/gpu/small_calls.py
}

traffic() {
  command -v ncu >/dev/null || { echo "ncu is not here"; return 127; }
  timeout -k 5 40 "$python" tests/gpu/traffic.py "$out/traffic.json"
}

bench() {
  local seconds
  seconds=$(left 75)
  [ "$seconds" -gt 225 ] && seconds=225
  timeout -k 5 "$((seconds + 15))" "$python" -m compress.kernels.bench --out "$out/bench.json" --seconds "$seconds"
}

step() { timeout -k 5 "$(left)" "$python" tests/gpu/step.py --out "$out/step.json"; }

part correctness 67 correctness
part memcheck 4 sanitizer memcheck
part racecheck 4 sanitizer racecheck
part traffic 8 traffic
part bench 60 bench
part step 4 step

correct=0
for i in "${!names[@]}"; do
  case ${names[$i]}:${statuses[$i]} in
    *:0) ;;
    correctness:* | memcheck:9 | racecheck:9) correct=1 && echo "FAILED: ${names[$i]}, see $log" ;;
    *) echo "not done: ${names[$i]} (status ${statuses[$i]}), see $log" ;;
  esac
done
"$python" - "$out/summary.json" $correct "${names[*]}" "${statuses[*]}" "${durations[*]}" <<'PYTHON'
import sys
from runtime import machine
from runtime.files import write_json

path, wrong, names, *columns = sys.argv[1:]
parts = zip(names.split(), *(map(int, column.split()) for column in columns), strict=True)
write_json(path, {
    "correct": wrong == "0",
    "parts": [{"part": part, "status": status, "seconds": seconds} for part, status, seconds in parts],
    "machine": machine.facts(),
})
PYTHON
echo "$SECONDS s in all"
exit $correct
