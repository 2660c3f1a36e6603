// Counts what fails and prints the first of it.
#pragma once
#include <cstdio>

inline int failures = 0;

#define CHECK(CONDITION, ...)                                      \
  do {                                                             \
    if (!(CONDITION)) {                                            \
      if (++failures < 40) {                                       \
        std::printf("FAILED line %d: %s: ", __LINE__, #CONDITION); \
        std::printf(__VA_ARGS__);                                  \
        std::printf("\n");                                         \
      }                                                            \
    }                                                              \
  } while (0)
