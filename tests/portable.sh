#!/usr/bin/env bash
# The default run as other machines would do it: portable.sh PYTEST ARGUMENTS...
# Each value of each setting comes at least once: two instruction sets and the machine's own, one and two threads,
# three seeds, and fresh memory that is full of huge numbers, so that a read of what was never written shows. Where there
# are no vector instructions torch's inductor cannot compile; those tests are left out there.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_WAIT_POLICY=passive # threads that wait leave the cores to the others

# ATEN_CPU_CAPABILITY  MKL_ENABLE_INSTRUCTIONS  ONEDNN_MAX_CPU_ISA  MALLOC_PERTURB_  threads  seed
runs="
default                -                        -                   -                1        1
default                -                        -                   128              2        2
avx2                   AVX2                     AVX2                128              1        2
avx2                   AVX2                     AVX2                -                2        0
-                      -                        -                   128              2        1
"
failed=0
while read -r aten mkl onednn perturb threads seed; do
  [ -n "$aten" ] || continue
  set_to=()
  [ "$aten" = - ] || set_to+=("ATEN_CPU_CAPABILITY=$aten")
  [ "$mkl" = - ] || set_to+=("MKL_ENABLE_INSTRUCTIONS=$mkl")
  [ "$perturb" = - ] || set_to+=("MALLOC_PERTURB_=$perturb")
  [ "$onednn" = - ] || set_to+=("ONEDNN_MAX_CPU_ISA=$onednn")
  set_to+=("TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)") # what another instruction set compiled must not be met
  echo "== ${set_to[*]}, threads $threads, seed $seed"
  env "${set_to[@]}" "$@" --threads "$threads" --seed "$seed" </dev/null || failed=1
done <<<"$runs"
exit $failed
