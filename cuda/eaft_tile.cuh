// The passes over a tile of logits, device code only: no launches, no torch, no inline PTX, so that nvcc (eaft_tile.cu)
// and the host twin (host/twin.cpp) compile the same text. README.md derives the algorithm.
//
//  * One block works on one row; the blocks of a tile are independent, and every result is bit-repeatable.
//  * Rows are read 16 bytes at a time from their first aligned address on; the ragged ends are peeled.
//  * Offsets into the tile are 64-bit. A row has fewer than 2^31 elements.
//
// Legend: R rows of a tile, V vocabulary, K size of the top-K entropy, z logits, y label.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

namespace eaft {

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
// Logits that a thread works on at once: four, or two, 16-byte loads under way.
constexpr int STEP = 16;
// Logits above the threshold of the top-K that are sorted in shared memory; beyond, the threshold is searched for.
constexpr int CANDIDATES = 1024;
// Block of tile_columns.
constexpr int COLUMNS = 64;
constexpr int ROW_GROUPS = THREADS / COLUMNS;

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f;
// An exponent whose exponential is 0, yet finite: 0 * FLOOR is 0 where 0 * -inf would be NaN.
constexpr float FLOOR = -110.f;

// --- storage ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void widen(__nv_bfloat162 pair, float& low, float& high) {
  const float2 both = __bfloat1622float2(pair);
  low = both.x, high = both.y;
}
__device__ __forceinline__ void widen(__half2 pair, float& low, float& high) {
  const float2 both = __half22float2(pair);
  low = both.x, high = both.y;
}
__device__ __forceinline__ void narrow(float low, float high, __nv_bfloat162& pair) {
  pair = __floats2bfloat162_rn(low, high);
}
__device__ __forceinline__ void narrow(float low, float high, __half2& pair) { pair = __floats2half2_rn(low, high); }

// The layout of a dtype in memory: single elements, and WIDTH of them in 16 bytes.
template <typename T, typename Pair>
struct HalfStorage {
  static constexpr int WIDTH = 8;
  __device__ static __forceinline__ void unpack(const uint4& packed, float* values) {
    Pair pairs[4];
    memcpy(pairs, &packed, sizeof pairs);
#pragma unroll
    for (int i = 0; i < 4; i++) widen(pairs[i], values[2 * i], values[2 * i + 1]);
  }
  __device__ static __forceinline__ uint4 pack(const float* values) {
    Pair pairs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) narrow(values[2 * i], values[2 * i + 1], pairs[i]);
    uint4 packed;
    memcpy(&packed, pairs, sizeof packed);
    return packed;
  }
};

template <typename T>
struct Storage;

template <>
struct Storage<__nv_bfloat16> : HalfStorage<__nv_bfloat16, __nv_bfloat162> {
  __device__ static __forceinline__ float load(const __nv_bfloat16* at) { return __bfloat162float(*at); }
  __device__ static __forceinline__ void store(__nv_bfloat16* at, float value) { *at = __float2bfloat16_rn(value); }
};

template <>
struct Storage<__half> : HalfStorage<__half, __half2> {
  __device__ static __forceinline__ float load(const __half* at) { return __half2float(*at); }
  __device__ static __forceinline__ void store(__half* at, float value) { *at = __float2half_rn(value); }
};

template <>
struct Storage<float> {
  static constexpr int WIDTH = 4;
  __device__ static __forceinline__ float load(const float* at) { return *at; }
  __device__ static __forceinline__ void store(float* at, float value) { *at = value; }
  __device__ static __forceinline__ void unpack(const uint4& packed, float* values) {
    memcpy(values, &packed, sizeof packed);
  }
  __device__ static __forceinline__ uint4 pack(const float* values) {
    uint4 packed;
    memcpy(&packed, values, sizeof packed);
    return packed;
  }
};

template <typename T>
struct Storage<const T> : Storage<T> {};

// One row: `head` elements up to the first aligned address, `vectors` of 16 bytes, `tail` elements.
template <typename T>
struct Row {
  static constexpr int WIDTH = Storage<T>::WIDTH;
  static constexpr int LOADS = STEP / WIDTH;
  using Vector = std::conditional_t<std::is_const_v<T>, const uint4, uint4>;
  T* data;
  int head, vectors, tail;

  __device__ __forceinline__ Row(T* data, int vocab) : data(data) {
    const int past = (int)(reinterpret_cast<uintptr_t>(data) % sizeof(uint4));
    head = past ? (int)((sizeof(uint4) - past) / sizeof(T)) : 0;
    head = head < vocab ? head : vocab;
    vectors = (vocab - head) / WIDTH;
    tail = vocab - head - vectors * WIDTH;
  }
  __device__ __forceinline__ Vector* body() const { return reinterpret_cast<Vector*>(data + head); }
  __device__ __forceinline__ int column(int vector) const { return head + vector * WIDTH; }
  __device__ __forceinline__ int tail_column() const { return column(vectors); }
};

// From raw projections to logits: softcap * tanh(scale * raw / softcap), or scale * raw.
template <bool SOFTCAP>
struct Transform {
  float scale, softcap;

  // tanh of the capped logit; without a softcap the logit itself
  __device__ __forceinline__ float inner(float raw) const {
    return SOFTCAP ? tanhf(__fmul_rn(raw, scale / softcap)) : __fmul_rn(raw, scale);
  }
  // Rounded products, never part of a fused multiply-add: equal projections must give equal logits everywhere.
  __device__ __forceinline__ float operator()(float raw) const {
    return SOFTCAP ? __fmul_rn(softcap, inner(raw)) : inner(raw);
  }
};

// Calls f(z[STEP]) on the logits of the row that belong to this thread; slots without a logit hold -inf.
template <typename T, bool SOFTCAP, typename F>
__device__ __forceinline__ void for_each_step(const Row<T>& row, const Transform<SOFTCAP>& transform, F f) {
  constexpr int WIDTH = Row<T>::WIDTH, LOADS = Row<T>::LOADS;
  const int thread = threadIdx.x;
  float z[STEP];
  if (thread < row.head || thread < row.tail) {
#pragma unroll
    for (int i = 0; i < STEP; i++) z[i] = -INFINITY;
    if (thread < row.head) z[0] = transform(Storage<T>::load(row.data + thread));
    if (thread < row.tail) z[1] = transform(Storage<T>::load(row.data + row.tail_column() + thread));
    f(z);
  }
  for (int first = thread; first < row.vectors; first += THREADS * LOADS) {
    uint4 packed[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; u++)
      if (first + u * THREADS < row.vectors) packed[u] = row.body()[first + u * THREADS];
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
      if (first + u * THREADS < row.vectors) {
        Storage<T>::unpack(packed[u], z + u * WIDTH);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) z[u * WIDTH + i] = transform(z[u * WIDTH + i]);
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; i++) z[u * WIDTH + i] = -INFINITY;
      }
    }
    f(z);
  }
}

// --- online statistics -----------------------------------------------------------------------------------------------

// Some logits, one occurrence of their maximum kept out of the sums: rest = sum e^(z - maximum),
// spread = sum (maximum - z) e^(z - maximum). Every term is >= 0.
struct Online {
  float maximum, rest, spread;

  __device__ static __forceinline__ Online empty() { return Online{-INFINITY, 0.f, 0.f}; }

  template <int N>
  __device__ __forceinline__ void add(const float (&z)[N]) {
    // One bubble: the largest of {maximum, z...} rises, the others stay behind in `lower`. A NaN stays behind too, and
    // makes the sums NaN.
    float lower[N], highest = maximum;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const bool above = z[i] > highest;
      lower[i] = above ? highest : z[i];
      highest = above ? z[i] : highest;
    }
    const float base = highest == -INFINITY ? 0.f : highest;
    const float moved = maximum - base;
    const float shrink = exp2f(moved * LOG2_E);
    spread = shrink * (spread - fmaxf(moved, FLOOR) * rest);
    rest *= shrink;
    maximum = highest;
#pragma unroll
    for (int i = 0; i < N; i++) {
      const float x = lower[i] - base;
      const float e = exp2f(x * LOG2_E);
      rest += e;
      spread -= fmaxf(x, FLOOR) * e;
    }
  }

  // Both together; the lower maximum enters the sums.
  __device__ static __forceinline__ Online combine(const Online& a, const Online& b) {
    const bool a_wins = a.maximum >= b.maximum;
    const Online& high = a_wins ? a : b;
    const Online& low = a_wins ? b : a;
    const float x = low.maximum - (high.maximum == -INFINITY ? 0.f : high.maximum);
    const float e = exp2f(x * LOG2_E);
    const float count = 1.f + low.rest;
    return Online{high.maximum, high.rest + e * count, high.spread + e * (low.spread - fmaxf(x, FLOOR) * count)};
  }

  __device__ __forceinline__ float entropy() const { return log1pf(rest) + spread / (1.f + rest); }
};

// The shared memory of a block. In a function of its own: kernels that do not call it have none.
struct Scratch {
  Online warp[WARPS];
  float candidates[CANDIDATES];
  float sorted[THREADS];
  int count;
};
static __device__ __forceinline__ Scratch& scratch() {
  __shared__ Scratch memory;
  return memory;
}

// The lanes of a warp together, in every lane (equal to the last bit in lane 0 of every run).
__device__ __forceinline__ Online warp_combine(Online own) {
#pragma unroll
  for (int distance = 16; distance; distance >>= 1) {
    const Online other{__shfl_xor_sync(ALL_LANES, own.maximum, distance), __shfl_xor_sync(ALL_LANES, own.rest, distance),
                       __shfl_xor_sync(ALL_LANES, own.spread, distance)};
    own = Online::combine(own, other);
  }
  return own;
}

// The threads of the block together; only warp 0 gets the result.
__device__ __forceinline__ Online block_combine(Online own) {
  Scratch& shared = scratch();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  own = warp_combine(own);
  if (lane == 0) shared.warp[warp] = own;
  __syncthreads();
  if (warp == 0) own = warp_combine(lane < WARPS ? shared.warp[lane] : Online::empty());
  __syncthreads();
  return own;
}

__device__ __forceinline__ int block_sum(int own) {
  Scratch& shared = scratch();
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  atomicAdd(&shared.count, own);
  __syncthreads();
  const int sum = shared.count;
  __syncthreads();
  return sum;
}

// --- top-K -----------------------------------------------------------------------------------------------------------

// Unsigned integers in the order of the floats.
__device__ __forceinline__ uint32_t key_of(float z) {
  const uint32_t bits = __float_as_uint(z);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float value_of(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// The k-th largest value, bit by bit, given how many values have at least a key.
template <typename Count>
__device__ __forceinline__ float kth_largest(int k, Count count_at_least) {
  uint32_t key = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; bit--) {
    const uint32_t trial = key | 1u << bit;
    if (count_at_least(trial) >= k) key = trial;
  }
  return value_of(key);
}

// `above` are the values over the threshold, `count` in number; copies of the threshold fill up to k.
__device__ __forceinline__ float filled_entropy(const Online& above, int count, float threshold, int k) {
  if (count >= k) return above.entropy();
  return Online::combine(above, Online{threshold, (float)(k - count - 1), 0.f}).entropy();
}

// Entropy of the k largest by a search over the whole row: exact for any k and any row, but 32 looks at it.
template <typename T, bool SOFTCAP>
__device__ __forceinline__ float topk_entropy_by_search(const Row<T>& row, const Transform<SOFTCAP>& transform, int k) {
  const float threshold = kth_largest(k, [&](uint32_t trial) {
    int own = 0;
    for_each_step(row, transform, [&](const float(&z)[STEP]) {
#pragma unroll
      for (int i = 0; i < STEP; i++) own += key_of(z[i]) >= trial;
    });
    return block_sum(own);
  });
  Online above = Online::empty();
  int own = 0;
  for_each_step(row, transform, [&](float(&z)[STEP]) {
#pragma unroll
    for (int i = 0; i < STEP; i++) {
      const bool over = z[i] > threshold;
      own += over;
      z[i] = over ? z[i] : -INFINITY;
    }
    above.add(z);
  });
  const int count = block_sum(own);
  return filled_entropy(block_combine(above), count, threshold, k);
}

// Entropy of the k largest logits renormalised among themselves, in thread 0. `highest` is the largest of this thread.
//
// The k-th largest of the threads' maxima is a threshold that at least k logits reach. Those above it are few and belong
// to fewer than k threads: only these make a second pass. Ties with the threshold are counted, not collected.
template <typename T, bool SOFTCAP>
__device__ __forceinline__ float topk_entropy(const Row<T>& row, const Transform<SOFTCAP>& transform, float highest,
                                              int k) {
  Scratch& shared = scratch();
  const int thread = threadIdx.x;
  float threshold = -INFINITY;
  int count = CANDIDATES + 1;
  if (k <= THREADS) {
    if (thread == 0) shared.count = 0;
    const uint32_t key = key_of(highest);
    // its barriers also order the zero above before the additions below
    threshold = kth_largest(k, [&](uint32_t trial) { return __syncthreads_count(key >= trial); });
    if (highest > threshold) {
      for_each_step(row, transform, [&](const float(&z)[STEP]) {
#pragma unroll
        for (int i = 0; i < STEP; i++) {
          if (z[i] > threshold) {
            const int slot = atomicAdd(&shared.count, 1);
            if (slot < CANDIDATES) shared.candidates[slot] = z[i];
          }
        }
      });
    }
    __syncthreads();
    count = shared.count;
    __syncthreads();
  }
  if (count > CANDIDATES) return topk_entropy_by_search(row, transform, k);
  // sorted by rank, because the order of arrival differs from run to run
  for (int i = thread; i < count; i += THREADS) {
    const float own = shared.candidates[i];
    int rank = 0;
    for (int j = 0; j < count; j++) {
      const float other = shared.candidates[j];
      rank += other > own || (other == own && j < i);
    }
    if (rank < k) shared.sorted[rank] = own;
  }
  __syncthreads();
  if (thread >= 32) return 0.f;
  Online above = Online::empty();
  for (int i = thread; i < k && i < count; i += 32) above.add({shared.sorted[i]});
  return filled_entropy(warp_combine(above), count, threshold, k);
}

// --- kernels ---------------------------------------------------------------------------------------------------------

// Outputs of tile_statistics, [R] each.
struct Statistics {
  float *nll, *entropy, *topk_entropy;
  unsigned char* correct;
  float *maximum, *rest;
};

// One block a row. `topk` = 0: no top-K entropy. A label outside [0, V) gives NaN.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS, 2)
    tile_statistics(const T* logits, int64_t row_stride, const int64_t* labels, int vocab,
                    Transform<SOFTCAP> transform, int topk, Statistics out) {
  const int64_t r = blockIdx.x;
  const Row<const T> row(logits + r * row_stride, vocab);
  Online own = Online::empty();
  for_each_step(row, transform, [&](const float(&z)[STEP]) { own.add(z); });
  Online all = block_combine(own);
  // a logit of +inf would leave an entropy of 0, and so a closed gate: it must show, as a NaN does
  if (all.maximum == INFINITY) all.rest = NAN;
  if (threadIdx.x == 0) {
    const int64_t y = labels[r];
    const bool inside = y >= 0 && y < vocab;
    const float target = inside ? transform(Storage<T>::load(row.data + y)) : NAN;
    out.nll[r] = log1pf(all.rest) - (target - all.maximum);
    out.entropy[r] = all.entropy();
    out.correct[r] = target == all.maximum;
    out.maximum[r] = all.maximum;
    out.rest[r] = all.rest;
  }
  if (topk > 0) {
    const float entropy = topk_entropy(row, transform, own.maximum, topk < vocab ? topk : vocab);
    // a NaN logit is in no top-K, but must show
    if (threadIdx.x == 0) out.topk_entropy[r] = isnan(all.rest) ? all.rest : entropy;
  }
}

// The inputs of tile_gradient, [R] each.
struct GradientInputs {
  const float *nll, *maximum, *rest, *weight;
};

// One block per row, in place: w (softmax(z) - onehot(y)) dz/draw. A label outside [0, V) has its target elsewhere.
template <typename T, bool SOFTCAP>
__global__ void __launch_bounds__(THREADS, 2)
    tile_gradient(T* logits, int64_t row_stride, const int64_t* labels, int vocab, Transform<SOFTCAP> transform,
                  GradientInputs in) {
  constexpr int WIDTH = Row<T>::WIDTH, LOADS = Row<T>::LOADS;
  const int64_t r = blockIdx.x;
  const Row<T> row(logits + r * row_stride, vocab);
  const int64_t y = labels[r];
  const int label = y >= 0 && y < vocab ? (int)y : -1;
  const float weight = in.weight[r] * transform.scale;
  const float coefficient = weight / (1.f + in.rest[r]);
  const float maximum = in.maximum[r];
  // p_y - 1 formed once: it keeps its digits where p_y is close to 1
  const float target = weight * expm1f(-in.nll[r]);

  const auto gradient = [&](float raw, int column) {
    const float t = transform.inner(raw);
    const float z = SOFTCAP ? __fmul_rn(transform.softcap, t) : t;
    const float g = column == label ? target : coefficient * exp2f((z - maximum) * LOG2_E);
    return SOFTCAP ? g * (1.f - t * t) : g;
  };
  const int thread = threadIdx.x;
  if (thread < row.head) {
    T* at = row.data + thread;
    Storage<T>::store(at, gradient(Storage<T>::load(at), thread));
  }
  if (thread < row.tail) {
    const int column = row.tail_column() + thread;
    Storage<T>::store(row.data + column, gradient(Storage<T>::load(row.data + column), column));
  }
  for (int first = thread; first < row.vectors; first += THREADS * LOADS) {
    uint4 packed[LOADS];
#pragma unroll
    for (int u = 0; u < LOADS; u++)
      if (first + u * THREADS < row.vectors) packed[u] = row.body()[first + u * THREADS];
#pragma unroll
    for (int u = 0; u < LOADS; u++) {
      const int vector = first + u * THREADS;
      if (vector < row.vectors) {
        float values[WIDTH];
        Storage<T>::unpack(packed[u], values);
#pragma unroll
        for (int i = 0; i < WIDTH; i++) values[i] = gradient(values[i], row.column(vector) + i);
        row.body()[vector] = Storage<T>::pack(values);
      }
    }
  }
}

struct ColumnScratch {
  float sum[ROW_GROUPS][COLUMNS];
  int reached[ROW_GROUPS][COLUMNS];
};
static __device__ __forceinline__ ColumnScratch& column_scratch() {
  __shared__ ColumnScratch memory;
  return memory;
}

// Of each column: does any |gradient| reach the threshold (a NaN does), and the sum of the column. Blocks of
// COLUMNS x ROW_GROUPS threads; the sums are in a fixed order.
template <typename T>
__global__ void __launch_bounds__(THREADS, 2)
    tile_columns(const T* gradient, int64_t row_stride, int64_t rows, int vocab, float threshold, unsigned char* keep,
                 float* mass) {
  ColumnScratch& shared = column_scratch();
  const int lane = threadIdx.x, group = threadIdx.y;
  const int column = blockIdx.x * COLUMNS + lane;
  float sum = 0.f;
  bool any = false;
  if (column < vocab) {
#pragma unroll 4
    for (int64_t r = group; r < rows; r += ROW_GROUPS) {
      const float g = Storage<T>::load(gradient + r * row_stride + column);
      sum += g;
      any |= !(fabsf(g) < threshold);
    }
  }
  shared.sum[group][lane] = sum;
  shared.reached[group][lane] = any;
  __syncthreads();
  if (group == 0 && column < vocab) {
    for (int other = 1; other < ROW_GROUPS; other++) {
      sum += shared.sum[other][lane];
      any |= shared.reached[other][lane] != 0;
    }
    mass[column] = sum;
    keep[column] = any;
  }
}

}  // namespace eaft
