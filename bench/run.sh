#!/usr/bin/env bash
# The full table of bench/LOG.md: every case with its peers, and the ceilings of the machine first.
# Usage: bench/run.sh [RESULTS.json]; PYTHON names an interpreter that has recurra[bench] installed.
set -euo pipefail
python=${PYTHON:-python3}
json=$(realpath -m "${1:-bench-results.json}")
# Away from the sources, whose package has no compiled library.
cd "${TMPDIR:-/tmp}"
exec "$python" -m recurra bench selective_scan linear_scan causal_conv1d import \
  --rates --peers --repeat "${REPEAT:-11}" --json "$json"
