// Launchers with a plain C ABI: Python loads the library with ctypes and passes pointers, sizes and the stream to work
// on. Each returns a cudaError_t as int; none waits for the device. The host twin compiles this file too.
//
// Strides are in elements, labels and strides 64-bit. softcap 0: none. topk 0: no top-K entropy.
#include "eaft_tile.cuh"

#ifndef EAFT_HOST_TWIN
#include <cuda_runtime.h>
#define EAFT_LAUNCH(kernel, grid, block, stream, ...) \
  (kernel<<<grid, block, 0, stream>>>(__VA_ARGS__), (int)cudaGetLastError())
#endif

// The architectures this library was built for, "80 90 ...": given by build.py.
#ifndef EAFT_ARCHITECTURES
#define EAFT_ARCHITECTURES "unknown"
#endif

namespace {

using namespace eaft;

constexpr int64_t MOST = 2147483647 - THREADS * STEP;  // columns of a row, rows of a tile

bool fits(int64_t rows, int64_t vocab) { return rows >= 0 && vocab > 0 && rows <= MOST && vocab <= MOST; }

template <typename T, bool SOFTCAP>
int launch_statistics(const void* logits, int64_t row_stride, const int64_t* labels, int64_t rows, int64_t vocab,
                      Transform<SOFTCAP> transform, int topk, Statistics out, cudaStream_t stream) {
  return EAFT_LAUNCH((tile_statistics<T, SOFTCAP>), dim3((unsigned)rows), dim3(THREADS), stream, (const T*)logits,
                     row_stride, labels, (int)vocab, transform, topk, out);
}

template <typename T, bool SOFTCAP>
int launch_gradient(void* logits, int64_t row_stride, const int64_t* labels, int64_t rows, int64_t vocab,
                    Transform<SOFTCAP> transform, GradientInputs in, cudaStream_t stream) {
  return EAFT_LAUNCH((tile_gradient<T, SOFTCAP>), dim3((unsigned)rows), dim3(THREADS), stream, (T*)logits, row_stride,
                     labels, (int)vocab, transform, in);
}

template <typename T>
int launch_columns(const void* gradient, int64_t row_stride, int64_t rows, int64_t vocab, float threshold,
                   unsigned char* keep, float* mass, cudaStream_t stream) {
  const unsigned blocks = (unsigned)((vocab + COLUMNS - 1) / COLUMNS);
  return EAFT_LAUNCH((tile_columns<T>), dim3(blocks), dim3(COLUMNS, ROW_GROUPS), stream, (const T*)gradient, row_stride,
                     rows, (int)vocab, threshold, keep, mass);
}

}  // namespace

#define EAFT_ABI(SUFFIX, T)                                                                                            \
  extern "C" int eaft_tile_statistics_##SUFFIX(                                                                        \
      const void* logits, int64_t row_stride, const int64_t* labels, int64_t rows, int64_t vocab, float scale,         \
      float softcap, int topk, float* nll, float* entropy, float* topk_entropy, unsigned char* correct,                \
      float* maximum, float* rest, cudaStream_t stream) {                                                              \
    if (!fits(rows, vocab) || topk < 0) return (int)cudaErrorInvalidValue;                                             \
    if (rows == 0) return (int)cudaSuccess;                                                                            \
    const Statistics out{nll, entropy, topk_entropy, correct, maximum, rest};                                          \
    if (softcap > 0)                                                                                                   \
      return launch_statistics<T>(logits, row_stride, labels, rows, vocab, Transform<true>{scale, softcap}, topk, out, \
                                  stream);                                                                             \
    return launch_statistics<T>(logits, row_stride, labels, rows, vocab, Transform<false>{scale, 0.f}, topk, out,      \
                                stream);                                                                               \
  }                                                                                                                    \
  extern "C" int eaft_tile_gradient_##SUFFIX(void* logits, int64_t row_stride, const int64_t* labels, int64_t rows,    \
                                             int64_t vocab, float scale, float softcap, const float* nll,              \
                                             const float* maximum, const float* rest, const float* weight,             \
                                             cudaStream_t stream) {                                                    \
    if (!fits(rows, vocab)) return (int)cudaErrorInvalidValue;                                                         \
    if (rows == 0) return (int)cudaSuccess;                                                                            \
    const GradientInputs in{nll, maximum, rest, weight};                                                               \
    if (softcap > 0)                                                                                                   \
      return launch_gradient<T>(logits, row_stride, labels, rows, vocab, Transform<true>{scale, softcap}, in, stream); \
    return launch_gradient<T>(logits, row_stride, labels, rows, vocab, Transform<false>{scale, 0.f}, in, stream);      \
  }                                                                                                                    \
  extern "C" int eaft_tile_columns_##SUFFIX(const void* gradient, int64_t row_stride, int64_t rows, int64_t vocab,     \
                                            float threshold, unsigned char* keep, float* mass, cudaStream_t stream) {  \
    if (!fits(rows, vocab)) return (int)cudaErrorInvalidValue;                                                         \
    return launch_columns<T>(gradient, row_stride, rows, vocab, threshold, keep, mass, stream);                        \
  }

EAFT_ABI(f32, float)
EAFT_ABI(bf16, __nv_bfloat16)
EAFT_ABI(f16, __half)

// Raised with every change of a signature above; the loader compares.
extern "C" int eaft_abi_version() { return 1; }

extern "C" const char* eaft_architectures() { return EAFT_ARCHITECTURES; }

#ifndef EAFT_HOST_TWIN
extern "C" const char* eaft_error_name(int error) { return cudaGetErrorName((cudaError_t)error); }

// cudaSuccess if this library has code for the device.
extern "C" int eaft_probe(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, (const void*)tile_statistics<__nv_bfloat16, false>);
    cudaSetDevice(before);
  }
  // an error that was looked at must not be met again at the next launch
  cudaGetLastError();
  return (int)error;
}
#endif
