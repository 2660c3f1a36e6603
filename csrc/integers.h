// The integers of a known width. NVRTC, which compiles cells at run time, has no header of the
// system; there they are the types of Linux, so that arguments lie as the host has them.
#pragma once
#if defined(__CUDACC_RTC__)
using int8_t = signed char;
using int16_t = short;
using int32_t = int;
using int64_t = long;
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using uint32_t = unsigned;
using uint64_t = unsigned long;
using uintptr_t = unsigned long;
#define INT32_MAX 2147483647
#else
#include <cstdint>
#endif
