#!/usr/bin/env bash
# What a CUDA device says, in at most nine minutes: the tests that need one, then the layers in bf16 against their limit
# and against other libraries' forms of them.
#
#   benchmarks/gpu.sh [--smoke] [DIR]
#
# DIR (by default $OUT, else runs/gpu) gets tests.txt, a folder for each suite, and all of it in gpu.json and gpu.md.
# A step that is out of time is stopped and leaves what it has. --smoke: tiny sizes on a CPU, to see that it runs.
# PYTHON: the interpreter, by default python.
set -uo pipefail

python=${PYTHON:-python} smoke=
if [ "${1:-}" = --smoke ]; then
  smoke=yes
  shift
fi
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
out=${1:-${OUT:-runs/gpu}}
case $out in /*) ;; *) out=$here/$out ;; esac

if [ -n "$smoke" ]; then
  tests=tests/test_gpu.py
  options=(--device cpu --dtype float32 --quick --rounds 1 --threads 1)
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  tests=tests
  options=(--device cuda --dtype bfloat16 --rounds 15)
else
  echo "gpu.sh: torch sees no CUDA device here; --smoke runs tiny sizes on a CPU" >&2
  exit 2
fi
mkdir -p "$out" || exit 2
: >"$out/steps.tsv"
failed=0

step() { # NAME SECONDS COMMAND...: in its time, with what it says in NAME.txt
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1 || code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$limit" "$((SECONDS - begin))" "$code" >>"$out/steps.tsv"
  [ "$code" = 0 ] || failed=1
}

# 175 + 130 + 50 + 50 + 80 seconds, 5 more for each that has to be killed, and what starting takes: below 540
step tests 175 "$python" -m pytest "$tests" -m gpu -q -rs --durations 0
step layer 130 "$python" -m spectralmoe bench layer --out "$out/layer" --allow-busy "${options[@]}"
step router 50 "$python" -m spectralmoe bench router --out "$out/router" --allow-busy "${options[@]}"
step decode 50 "$python" -m spectralmoe bench decode --out "$out/decode" --allow-busy "${options[@]}"
step step 80 "$python" -m spectralmoe bench step --out "$out/step" --allow-busy "${options[@]}"

"$python" - "$out" <<'END' || failed=1
import json
import pathlib
import sys

out = pathlib.Path(sys.argv[1])
rows = [line.split("\t") for line in (out / "steps.tsv").read_text().splitlines()]
ends = {"0": "done", "5": "nothing to test", "124": "out of time", "137": "out of time"}
lines = ["# On a GPU", "", "| step | at most | seconds | end |", "| --- | --- | --- | --- |"]
steps, suites, tables = [], {}, []
for name, limit, seconds, code in rows:
    said = (out / f"{name}.txt").read_text(errors="replace").strip().splitlines() or [""]
    end = ends.get(code, f"failed with {code}")
    steps.append({"name": name, "at_most": int(limit), "seconds": int(seconds), "end": end, "said": said[-1]})
    lines.append(f"| {name} | {limit} | {seconds} | {end}: {said[-1]} |")
    if (out / name / "bench.json").exists():
        suites[name] = json.loads((out / name / "bench.json").read_text())
        tables.append((out / name / "bench.md").read_text().replace("# Benchmark", f"# {name}", 1))
(out / "gpu.json").write_text(json.dumps({"steps": steps, "suites": suites}, indent=1))
(out / "gpu.md").write_text("\n".join([*lines, "", *tables]))
print("\n".join(lines[2:]))
print(f"everything: {out / 'gpu.md'}, {out / 'gpu.json'}")
END
rm -f "$out/steps.tsv"
exit $failed
