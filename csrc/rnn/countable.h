// Before all else of a program that counts what steps keep (rnn/kept.h): what cells are made of may
// be run by the compiler.
#pragma once
#include "math/macros.h"

#undef RECURRA_FN
#define RECURRA_CONSTANT_FN RECURRA_FN
#if defined(__CUDACC__)
#define RECURRA_FN constexpr __host__ __device__ __forceinline__
#else
#define RECURRA_FN constexpr
#endif
