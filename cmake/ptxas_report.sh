#!/bin/sh
# ptxas_report.sh NVCC... -o OBJECT...: compiles, and keeps in OBJECT.ptxas what ptxas says of each
# kernel, which ci/cuda_budget.py reads. Everything else goes where it would have gone.
object= previous=
for word in "$@"; do
  if [ "$previous" = -o ]; then object="$word"; fi
  previous="$word"
done
"$@" 2> "$object.ptxas"
status=$?
grep -v -E '^ptxas info|bytes stack frame' "$object.ptxas" >&2
exit $status
