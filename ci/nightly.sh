#!/usr/bin/env bash
# What takes too long for ci/test.sh: the nightly tier of the tests, the Python suite under
# AddressSanitizer and UBSan, tests/cpp under ThreadSanitizer and Valgrind, ten minutes of fuzzing,
# the accuracies of `recurra diag`. FUZZ_SECONDS changes the fuzzing.
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

setup_environment
# Named, because the build folder remembers the one architecture of ci/test.sh.
install_package test -C "cmake.define.RECURRA_CUDA_ARCHITECTURES=80-real;90;100-real;120-real"
export RECURRA_TEST_TIER=nightly

say "tests/cpp, plain and in full"
build_cpp_tests plain ""
ctest --test-dir "$CPP" -j 2 --no-tests=error --output-on-failure
if command -v valgrind > /dev/null; then
  say "Valgrind, scalar"
  valgrind -q --error-exitcode=1 "$CPP/tests/cpp/test_kernels" --isa scalar --cases 40
else
  say "Valgrind is not installed: left out"
fi

say "tests/cpp under ThreadSanitizer"
build_cpp_tests tsan thread
"$CPP/tests/cpp/test_kernels" --concurrent --cases 100

say "fuzzing under AddressSanitizer and UBSan"
build_cpp_tests asan address,undefined
"$CPP/tests/cpp/test_kernels" --seed "$(date +%s)" --seconds "${FUZZ_SECONDS:-600}"

say "pytest under AddressSanitizer and UBSan"
SITE="$BUILD/asan-site"
rm -rf "$SITE"
python -m pip install -q --no-build-isolation --no-deps --target "$SITE" \
  -C build-dir="$BUILD/package-asan" -C cmake.define.RECURRA_SANITIZE=address,undefined \
  -C cmake.define.RECURRA_CUDA=OFF .
# libstdc++ comes along because the runtime must find the exception functions when it starts.
preload="$("${CXX:-g++}" -print-file-name=libasan.so) $("${CXX:-g++}" -print-file-name=libstdc++.so.6)"
RECURRA_TEST_TIER=quick LD_PRELOAD="$preload" PYTHONPATH="$SITE" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 python -m pytest

say "accuracies of the diagnostics"
for task in parity flipflop evenpair s3 recall; do
  recurra diag "$task" --min-acc 0.99 --picture "$BUILD/$task.png"
done
for mixer in lru s4d; do
  recurra diag digits --mixer "$mixer" --min-acc 0.95 --picture "$BUILD/digits-$mixer.png"
done

say "pytest, nightly tier"
exec python -m pytest "$@"
