// The main() of a program that is compiled for one instruction set: this file is not, so that the
// question whether the machine has it can be asked on any machine.
#include <cstdio>
#include <cstring>

#include "simd/isa.h"

int test_main(int argc, char** argv);

int main(int argc, char** argv) {
  recurra::cap_isa(RECURRA_TEST_ISA);
  if (std::strcmp(recurra::isa_name(recurra::isa()), RECURRA_TEST_ISA) != 0) {
    std::printf("%s: this machine has no %s\n", argv[0], RECURRA_TEST_ISA);
    return 77;
  }
  return test_main(argc, argv);
}
