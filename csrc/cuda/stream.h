// Where a CUDA kernel runs. Nothing here needs the CUDA headers or a torch with CUDA.
#pragma once

namespace recurra::cuda {

struct Stream {
  int device = 0;
  void* handle = nullptr;  // a cudaStream_t
};

// The stream that torch uses on a device now.
Stream current_stream(int device);

}  // namespace recurra::cuda
