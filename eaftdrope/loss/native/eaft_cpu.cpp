// The gated cross-entropy on a CPU: statistics and gradient of a tile of logits, and what its backward adds up.
//
// A tile is R rows of raw logits x, in float32, bfloat16 or float16; z = x, scale * x, or softcap * tanh(scale * x /
// softcap) are the model's logits. Two passes over it, each row by one thread:
//
// Statistics (only read). With m = max z, and ONE occurrence of m kept out of both sums,
//     r = sum e^(z - m)     s = sum (m - z) e^(z - m)
//     entropy = log(1 + r) + s / (1 + r)     nll = log(1 + r) - (z_y - m)
// Every term is >= 0, so nothing cancels: the entropy keeps its digits down to 1e-30. A row is read in blocks that stay
// in the first cache: the block's maximum, then its sums in float32, folded into the row's in double. If the maximum
// rises from m to m', with f = e^(m - m') and the old maximum now counting like any other number,
//     s' = f (s + (m' - m) (1 + r)) + ...     r' = f (1 + r) + (what the block adds, one m' kept out)
// so numbers equal to the maximum are counted (each adds exactly 1) and only the others are summed.
//
// Top-K entropy. The K-th largest maximum of the sub-blocks is a lower bound on the K-th largest number: few numbers
// are above it, and they are selected exactly.
//
// Gradient (in place). x becomes w (softmax(z) - onehot(y)) dz/dx = w / (1 + r) e^(z - m) dz/dx, the target
// w expm1(-nll) dz/dx, rounded once.
//
// An anchor adds the divergence from a base model, whose tile lies beside (anchor_kernels.inc).
//
// Instruction sets. isa_*.inc name a handful of vector operations, tile_kernels.inc is written in terms of these and
// compiled once for each: portable (vector extensions: SSE2, NEON, ...), AVX2 + FMA + F16C, AVX-512 (F, BW, DQ, VL),
// AVX-512 with BF16. The choice is made at run time.
//
// Exponentials. e^x = 2^n p(f), n + f = x log2 e, p of degree 5: two units in the last place for float32 logits; for
// those of 16 bits |x| 8e-8 of itself, which is far below what their own rounding does.
//
// Threads. The caller names their number and may hand over GOMP_parallel of the OpenMP runtime it uses already: a
// second pool of threads would wait in a loop on cores that the first needs. Without one, threads are started for each
// call.
//
// Legend: R rows of a tile, V vocabulary, C some columns of it, H hidden size, K of the top-K entropy.

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#define EAFT_X86 1
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// log2 e and ln 2 in two floats each
constexpr float kLog2e = 1.44269504088896341f, kLog2eLow = 1.925963033500e-8f;
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
// 1.5 * 2^23 + 127: the step of float32 is 1 here
constexpr float kRound = 12583039.0f;

// Logits of 16 bits are not worth the exact exponential.
template <class T>
constexpr bool kExact = std::is_same<T, float>::value;

// Numbers of a block: 16 KiB of float32, half of a first-level cache.
constexpr int64_t kBlock = 4096;
// Numbers whose maximum is kept for the top-K selection.
constexpr int64_t kSubBlock = 512;
// Numbers of the longest step over a block, to which scratch is padded.
constexpr int kMostStep = 64;
// Distance in bytes between the gradient's position and its prefetches.
constexpr int64_t kGradientAhead = 2048;
// Columns summed at a time: their sums stay in the first cache.
constexpr int64_t kColumnBlock = 2048;

#include "jobs.inc"

// Entropy of the numbers in `top` and `others` more that equal `other`; m is the largest of all and counts once as 1.
double entropy_of(const float* top, int64_t count, float other, int64_t others, float m) {
  double rest = -1, spread = 0;
  const auto add = [&](float z, double times) {
    const double x = static_cast<double>(z) - m, e = times * std::exp(x);
    // e^-inf is 0, but not 0 * -inf
    if (e == 0) return;
    rest += e;
    spread -= x * e;
  };
  // the maximum first: -1 + 1 is exact, and every later sum is of small numbers
  const float* best = std::max_element(top, top + count);
  if (count > 0) add(*best, 1);
  if (others > 0) {
    if (count == 0) add(other, 1);
    add(other, static_cast<double>(others - (count == 0)));
  }
  for (const float* z = top; z < top + count; ++z) {
    if (z != best) add(*z, 1);
  }
  return std::log1p(rest) + spread / (1 + rest);
}

// Asks for the cache lines of what is read soon, into the first cache (3) or the second (2). Addresses beyond the tile
// are harmless; as integers they are no pointers to nowhere.
template <int cache>
inline __attribute__((always_inline)) void prefetch(const void* from, int64_t ahead, int64_t bytes) {
  const uintptr_t start = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(start + at), 0, cache);
}

}  // namespace

#define EAFT_ISA portable
#define EAFT_TARGET
#include "isa_portable.inc"
#include "tile_kernels.inc"

#ifdef EAFT_X86
#define EAFT_ISA avx2
#define EAFT_TARGET __attribute__((target("avx2,fma,f16c")))
#include "isa_avx2.inc"
#include "tile_kernels.inc"

#define EAFT_ISA avx512
#define EAFT_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "isa_avx512.inc"
#include "tile_kernels.inc"

#define EAFT_ISA avx512bf16
#define EAFT_TARGET __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define EAFT_BF16 1
#include "isa_avx512.inc"
#include "tile_kernels.inc"
#endif

namespace {

// --- instruction sets ------------------------------------------------------------------------------------------------

int find_best_isa() {
#ifdef EAFT_X86
  __builtin_cpu_init();
  // older compilers do not accept F16C by its name
  unsigned a, b, c = 0, d;
  const bool has_f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512) return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (has_avx2) return 1;
#endif
  return 0;
}

int best_isa() {
  // CPUID costs microseconds in a virtual machine
  static const int best = find_best_isa();
  return best;
}

std::atomic<int> chosen_isa{-1};

const Kernels& kernels() {
  const int chosen = chosen_isa.load(std::memory_order_relaxed);
  switch (chosen >= 0 ? chosen : best_isa()) {
#ifdef EAFT_X86
    case 3: return avx512bf16::kernels;
    case 2: return avx512::kernels;
    case 1: return avx2::kernels;
#endif
    default: return portable::kernels;
  }
}

// --- threads ---------------------------------------------------------------------------------------------------------

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<Parallel> openmp_parallel{nullptr};

// body(thread, first, last) over [0, items) in pieces of `grain`; whoever is free takes the next piece.
template <class Body>
void for_each(int64_t items, int64_t grain, int threads, const Body& body) {
  struct Shared {
    const Body& body;
    int64_t items, grain;
    std::atomic<int64_t> next{0};
    std::atomic<int> entered{0};
  } shared{body, items, grain};
  const auto work = [](void* context) {
    Shared& s = *static_cast<Shared*>(context);
    const int thread = s.entered++;
    for (int64_t first; (first = s.next.fetch_add(s.grain)) < s.items;) {
      s.body(thread, first, std::min(first + s.grain, s.items));
    }
  };
  const int useful = static_cast<int>(std::min<int64_t>(threads, (items + grain - 1) / grain));
  if (useful <= 1) return work(&shared);
  if (const Parallel openmp = openmp_parallel.load()) return openmp(work, &shared, static_cast<unsigned>(useful), 0);
  std::vector<std::thread> others;
  try {
    others.reserve(useful);
    for (int i = 1; i < useful; ++i) others.emplace_back(work, &shared);
  } catch (const std::exception&) {
    // no more threads to be had: those there are do all the work
  }
  work(&shared);
  for (std::thread& other : others) other.join();
}

// --- columns ---------------------------------------------------------------------------------------------------------

// Four rows at a time: their cache misses overlap, and each index is read once for all.
template <class T>
void gather(const T* from, int64_t stride, const int64_t* columns, int64_t count, T* to, int64_t rows) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const T *a = from + r * stride, *b = a + stride, *c = b + stride, *d = c + stride;
    T* out = to + r * count;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t column = columns[i];
      out[i] = a[column];
      out[i + count] = b[column];
      out[i + 2 * count] = c[column];
      out[i + 3 * count] = d[column];
    }
  }
  for (; r < rows; ++r) {
    for (int64_t i = 0; i < count; ++i) to[r * count + i] = from[r * stride + columns[i]];
  }
}

// --- statistics ------------------------------------------------------------------------------------------------------

// body(row, scratch) over the rows of a tile, with the scratch of a thread. Returns 1 if memory ran out.
template <class Body>
int for_each_row(const StatisticsJob& job, int64_t rows, int threads, const Body& body) {
  const int64_t sub_blocks = (job.vocab + kSubBlock - 1) / kSubBlock;
  // above the bound lie at most K - 1 sub-blocks; without a bound there are at most K
  const int64_t found = std::max(sub_blocks, std::min(job.topk, sub_blocks) * kSubBlock);
  const int64_t block = kBlock + kMostStep, size = 2 * block + sub_blocks + found;
  threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, rows)));
  const std::unique_ptr<float[]> memory(new (std::nothrow) float[size * threads]);
  if (!memory) return 1;
  for_each(rows, 1, threads, [&](int thread, int64_t first, int64_t last) {
    float* z = memory.get() + size * thread;
    Scratch scratch{z, z + 2 * block, z + 2 * block + sub_blocks, z + block};
    for (int64_t r = first; r < last; ++r) body(r, scratch);
  });
  return 0;
}

AnchorStatistics anchor_statistics(float* values, int64_t rows) {
  return {values, values + rows, values + 2 * rows, values + 3 * rows, values + 4 * rows};
}

}  // namespace

// --- the interface ---------------------------------------------------------------------------------------------------
// dtype: 0 float32, 1 bfloat16, 2 float16; strides in elements. Pointers are to contiguous arrays unless a stride says
// otherwise. Returns 0, or 1 if memory ran out.

extern "C" {

// Number of the instruction set in use: 0 portable, 1 AVX2, 2 AVX-512, 3 AVX-512 with BF16.
int eaft_isa() {
  const int chosen = chosen_isa.load();
  return chosen >= 0 ? chosen : best_isa();
}

// Uses a lower instruction set than the best one of this machine; -1 takes the best again. Returns the one in use.
int eaft_set_isa(int isa) {
  chosen_isa = isa < 0 || isa > best_isa() ? -1 : isa;
  return eaft_isa();
}

void eaft_set_parallel(void* gomp_parallel) { openmp_parallel = reinterpret_cast<Parallel>(gomp_parallel); }

int eaft_tile_statistics(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t stride,
                         const int64_t* labels, int kind, float scale, float softcap, int64_t topk, float* nll,
                         float* entropy, float* topk_entropy, float* maximum, float* rest, uint8_t* correct,
                         int threads) {
  const Transform transform{static_cast<Kind>(kind), scale, softcap};
  const StatisticsJob job{logits,  vocab,        stride,  labels, transform, std::min(topk, vocab), nll,
                          entropy, topk_entropy, maximum, rest,   correct};
  const Kernels& k = kernels();
  return for_each_row(job, rows, threads, [&](int64_t r, Scratch& scratch) {
    k.statistics_row[dtype](job, r, scratch);
  });
}

// The same, and the five statistics of an anchor (AnchorStatistics), `rows` numbers each, one after the other.
int eaft_anchored_statistics(const void* logits, int dtype, int64_t rows, int64_t vocab, int64_t stride,
                             const int64_t* labels, int kind, float scale, float softcap, int64_t topk, float* nll,
                             float* entropy, float* topk_entropy, float* maximum, float* rest, uint8_t* correct,
                             const void* base, int64_t base_stride, int base_kind, float base_scale,
                             float base_softcap, int forward, int mask_target, float* anchor, int threads) {
  const Transform transform{static_cast<Kind>(kind), scale, softcap};
  const Transform base_transform{static_cast<Kind>(base_kind), base_scale, base_softcap};
  const AnchoredStatisticsJob job{{logits, vocab, stride, labels, transform, std::min(topk, vocab), nll, entropy,
                                   topk_entropy, maximum, rest, correct},
                                  {base, base_stride, base_transform, forward != 0, mask_target != 0},
                                  anchor_statistics(anchor, rows)};
  const Kernels& k = kernels();
  return for_each_row(job.model, rows, threads, [&](int64_t r, Scratch& scratch) {
    k.anchored_statistics_row[dtype](job, r, scratch);
  });
}

int eaft_tile_gradient(void* logits, int dtype, int64_t rows, int64_t vocab, int64_t stride, const int64_t* labels,
                       int kind, float scale, float softcap, const float* maximum, const float* rest, const float* nll,
                       const float* weight, int threads) {
  const Transform transform{static_cast<Kind>(kind), scale, softcap};
  const GradientJob job{logits, vocab, stride, labels, transform, maximum, rest, nll, weight};
  const Kernels& k = kernels();
  for_each(rows, 1, threads, [&](int, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) k.gradient_row[dtype](job, r);
  });
  return 0;
}

int eaft_anchored_gradient(void* logits, int dtype, int64_t rows, int64_t vocab, int64_t stride, const int64_t* labels,
                           int kind, float scale, float softcap, const float* maximum, const float* rest,
                           const float* nll, const float* weight, const void* base, int64_t base_stride,
                           int base_kind, float base_scale, float base_softcap, int forward, int mask_target,
                           float* anchor, const float* anchor_weight, int threads) {
  const Transform transform{static_cast<Kind>(kind), scale, softcap};
  const Transform base_transform{static_cast<Kind>(base_kind), base_scale, base_softcap};
  const AnchoredGradientJob job{{logits, vocab, stride, labels, transform, maximum, rest, nll, weight},
                                {base, base_stride, base_transform, forward != 0, mask_target != 0},
                                anchor_statistics(anchor, rows),
                                anchor_weight};
  const Kernels& k = kernels();
  for_each(rows, 1, threads, [&](int, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) k.anchored_gradient_row[dtype](job, r);
  });
  return 0;
}

int eaft_tile_columns(const void* gradient, int dtype, int64_t rows, int64_t vocab, int64_t stride, float threshold,
                      uint8_t* keep, float* mass, int threads) {
  const ColumnsJob job{gradient, rows, stride, threshold, keep, mass};
  const Kernels& k = kernels();
  for_each((vocab + kColumnBlock - 1) / kColumnBlock, 1, threads, [&](int, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      k.column_block[dtype](job, b * kColumnBlock, std::min(vocab - b * kColumnBlock, kColumnBlock));
    }
  });
  return 0;
}

int eaft_add_rows(void* sum, int sum_dtype, int64_t sum_stride, const void* product, int product_dtype,
                  int64_t product_stride, const int64_t* rows, int64_t product_rows, int64_t columns, float factor,
                  int add, int threads) {
  const AddRowsJob job{sum, sum_stride, product, product_stride, rows, columns, factor, add != 0};
  const Kernels& k = kernels();
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(columns, 1));
  for_each(product_rows, grain, threads, [&](int, int64_t first, int64_t last) {
    k.add_rows[sum_dtype][product_dtype](job, first, last);
  });
  return 0;
}

// to[r, i] = from[r, columns[i]] for elements of 2 or 4 bytes; `to` is contiguous.
int eaft_gather_columns(const void* from, int element_bytes, int64_t rows, int64_t stride, const int64_t* columns,
                        int64_t count, void* to, int threads) {
  for_each(rows, 4, threads, [&](int, int64_t first, int64_t last) {
    if (element_bytes == 2) {
      gather(static_cast<const uint16_t*>(from) + first * stride, stride, columns, count,
             static_cast<uint16_t*>(to) + first * count, last - first);
    } else {
      gather(static_cast<const uint32_t*>(from) + first * stride, stride, columns, count,
             static_cast<uint32_t*>(to) + first * count, last - first);
    }
  });
  return 0;
}

}  // extern "C"
