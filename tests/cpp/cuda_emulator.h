// Enough of CUDA in plain C++ for kernels whose threads do not talk to one another: the threads run
// one after the other. A kernel with barriers or shuffles needs a stack for each thread instead.
#pragma once

#define __global__ static
#define __launch_bounds__(N)

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline thread_local Dim3 gridDim, blockDim, blockIdx, threadIdx;

enum cudaError_t { cudaSuccess };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

namespace recurra::cuda {

template <class Kernel, class... Arguments>
void emulate(Kernel kernel, unsigned blocks, unsigned threads, const Arguments&... arguments) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
}

}  // namespace recurra::cuda
