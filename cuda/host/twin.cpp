// Host twin of libeaft_cuda.so: the same symbols from the same sources, run on the CPU. For tests only.
#define EAFT_HOST_TWIN
#include "gpu_on_cpu.h"

#define EAFT_LAUNCH(kernel, grid, block, stream, ...) \
  ((void)(stream), goc::launch(grid, block, [&] { kernel(__VA_ARGS__); }), (int)cudaSuccess)
#define EAFT_ARCHITECTURES "host"

#include "../eaft_tile.cu"

extern "C" const char* eaft_error_name(int error) {
  return error == (int)cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "unknown";
}

// The host has code for every device: tensors are on the CPU.
extern "C" int eaft_probe(int) { return (int)cudaSuccess; }
