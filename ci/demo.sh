#!/usr/bin/env bash
# The main job, on a fresh Linux machine with Python 3.10 or later and a C++ compiler: sets up an
# environment of its own, builds and installs the package, trains a small Mamba for about two
# minutes on the text of the Python standard library, and writes a little with it. Everything it
# makes lies in build/demo. DEMO_MINUTES changes how long it trains.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment
# As in ci/test.sh, so that neither builds anew what the other has built.
install_package train -C cmake.define.RECURRA_CUDA_ARCHITECTURES=90-real
recurra info

RUNS="$ROOT/build/demo"
rm -rf "$RUNS"
say "training for about ${DEMO_MINUTES:-2} minutes"
recurra train "$RUNS/mamba" --minutes "${DEMO_MINUTES:-2}"
say "two steps of the same model on the plain-torch reference path"
recurra train "$RUNS/reference" --steps 2 --eval-batches 1 --reference

say "what came of it"
python - "$RUNS" << 'EOF'
import json, statistics, sys
from pathlib import Path

def column(run, key):
    lines = (Path(sys.argv[1]) / run / "log.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]

valid = column("mamba", "valid_bpb")
print("validation, bits per byte: " + " ".join(f"{v:.3f}" for v in valid))
if not valid[-1] < valid[0]:
    sys.exit("the validation loss did not fall")
ours, reference = (statistics.median(column(run, "tokens_per_second")) for run in ("mamba", "reference"))
print(f"recurra {ours:,.0f} tokens/s, plain-torch reference {reference:,.0f}: {ours / reference:.0f} x")
EOF
echo "loss picture $RUNS/mamba/loss.png"
echo "checkpoints  $(ls -d "$RUNS"/mamba/checkpoints/step-* | tr '\n' ' ')"

say "a sample"
recurra generate "$RUNS/mamba" --prompt "def " --max-tokens 400 --temperature 0.7 --seed 1 --tokens-per-second
