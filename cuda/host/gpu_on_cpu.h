// Runs CUDA kernels on the host: one fiber per CUDA thread, one block at a time. For tests only.
//
//  * NVIDIA's own headers give the types and the bf16/fp16 conversions (they are host + device).
//  * Barriers and warp collectives are checked: a divergent or mismatched one aborts with a report.
//  * Shared memory is filled with 0xFF bytes (NaN) before each block.
//  * GOC_SEED=<n> shuffles thread and block order, so that order-dependent results show up.
//  * -fsanitize=address,undefined : out of bounds (global and shared), misaligned vector access.
//  * -fsanitize=thread            : data races. Fibers are TSan fibers with NO implied ordering; only barriers,
//                                   atomics and the launch order them. Shuffles do not, as on a GPU.
//
// Use: put kernels in a .cuh without <<<>>>; include this header, then the .cuh; launch with
//   goc::launch(grid, block, [&] { kernel<...>(args...); });
// __shared__ variables belong in a non-template function with internal linkage: GCC gives others no section, and so no
// NaN. x86-64 Linux, GCC or clang, C++17. A built-in that is missing here is a compile error: add it.
#pragma once
#include <cuda_runtime_api.h>
#include <vector_functions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

// ---- which sanitizer is on (GCC and clang spell it differently) ----
#if defined(__SANITIZE_THREAD__)
#define GOC_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define GOC_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define GOC_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GOC_ASAN 1
#endif
#endif

// GOC_IGN .. GOC_CHK: TSan ignores the scheduler's own accesses in between. GOC_REL / GOC_ACQ: happens-before edges.
#ifdef GOC_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define GOC_IGN (AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0))
#define GOC_CHK (AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0))
#define GOC_REL(p) __tsan_release((void*)(p))
#define GOC_ACQ(p) __tsan_acquire((void*)(p))
#else
#define GOC_REL(p)
#define GOC_ACQ(p)
#define GOC_IGN
#define GOC_CHK
#endif
#ifdef GOC_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}
#endif

// ---- CUDA keywords as host code ----
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#undef __constant__
#undef __restrict__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __constant__
#define __shared__ static __attribute__((section("goc_shared")))

extern "C" {
extern char __start_goc_shared[] __attribute__((weak));  // bounds of the section, given by the linker
extern char __stop_goc_shared[] __attribute__((weak));
void goc_switch(void** save_sp, void* to_sp);
}

// Context switch: push the callee-saved registers, swap stack pointers, pop them on the other side.
__asm__(R"(
.text
.weak goc_switch
.type goc_switch,@function
goc_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

#define GOC_NO_TSAN __attribute__((no_sanitize("thread")))

namespace goc {

enum State { RUN, BLOCK_BAR, WARP, DONE };

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  State state = RUN;
  uint3 tid;
  int linear = 0;            // threadIdx flattened; lane = linear & 31, warp = linear >> 5
  const char* op = nullptr;  // the barrier or collective it waits at
  unsigned mask = 0;
  alignas(16) unsigned char val[16];  // what it deposits for a shuffle
  int value = 0;                      // what it brings to a barrier, and the sum it gets
  void* tsan = nullptr;
};

constexpr size_t STACK_BYTES = 1 << 16;

inline std::vector<Fiber> fibers;
inline Fiber* cur = nullptr;
inline void* main_sp = nullptr;
inline void* main_tsan = nullptr;
inline const void* main_stack;
inline size_t main_stack_size;
inline dim3 gdim, bdim;
inline uint3 bidx;
inline const std::function<void()>* body;
inline unsigned barriers_passed = 0;
inline char tok_start, tok_end, tok_bar[2];  // addresses TSan hangs its edges on

[[noreturn]] inline void die(const char* msg) {
  fprintf(stderr, "GPU_ON_CPU: %s in block (%u,%u,%u)\n", msg, bidx.x, bidx.y, bidx.z);
  int printed = 0;
  for (auto& f : fibers)
    if (f.state != DONE && printed++ < 8)
      fprintf(stderr, "  thread (%u,%u,%u) waits at %s mask %08x\n", f.tid.x, f.tid.y, f.tid.z,
              f.op ? f.op : "(running)", f.mask);
  abort();
}

// Fiber -> scheduler.
GOC_NO_TSAN inline void to_scheduler() {
#ifdef GOC_ASAN
  void* fake;
  __sanitizer_start_switch_fiber(cur->state == DONE ? nullptr : &fake, main_stack, main_stack_size);
#endif
#ifdef GOC_TSAN
  __tsan_switch_to_fiber(main_tsan, 1);
#endif
  goc_switch(&cur->sp, main_sp);
#ifdef GOC_ASAN
  __sanitizer_finish_switch_fiber(fake, &main_stack, &main_stack_size);
#endif
}

// First code a fiber runs: the kernel body, once.
inline void entry() {
#ifdef GOC_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &main_stack, &main_stack_size);
#endif
  GOC_IGN;
  GOC_ACQ(&tok_start);
  auto* fn = body;
  GOC_CHK;
  (*fn)();
  GOC_IGN;
  GOC_REL(&tok_end);
  cur->state = DONE;
  cur->op = "exited";
  GOC_CHK;
  to_scheduler();
  abort();
}

// Scheduler -> fiber.
inline void to_fiber(Fiber& f) {
  cur = &f;
#ifdef GOC_ASAN
  void* fake;
  __sanitizer_start_switch_fiber(&fake, f.stack, STACK_BYTES);
#endif
#ifdef GOC_TSAN
  __tsan_switch_to_fiber(f.tsan, 1);
#endif
  goc_switch(&main_sp, f.sp);
#ifdef GOC_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  cur = nullptr;
}

// All threads meet and order memory; each gets the sum of what they bring.
inline int block_barrier(const char* op, int value) {
  GOC_IGN;
  // Two tokens in turn: with one, a thread that leaves this barrier late would also acquire what another thread, already
  // at the next one, has released there, and races between the two would be hidden.
  char* token = &tok_bar[barriers_passed % 2];
  GOC_REL(token);
  cur->state = BLOCK_BAR;
  cur->op = op;
  cur->value = value;
  to_scheduler();
  GOC_ACQ(token);
  const int sum = cur->value;
  GOC_CHK;
  return sum;
}

// All lanes of `mask` meet; returns when all have arrived. No memory barrier.
inline void meet(const char* op, unsigned mask) {
  GOC_IGN;
  Fiber& f = *cur;
  if (!(mask >> (f.linear & 31) & 1)) die("warp collective called by a lane outside its mask");
  f.state = WARP;
  f.op = op;
  f.mask = mask;
  to_scheduler();
  GOC_CHK;
}

// No thread can run: release a complete block barrier or complete warp meetings, or report a deadlock.
inline void try_release() {
  const size_t n = fibers.size();
  size_t at_bar = 0, done = 0;
  for (auto& f : fibers) {
    at_bar += f.state == BLOCK_BAR;
    done += f.state == DONE;
  }
  if (at_bar == n) {
    barriers_passed++;
    int sum = 0;
    for (auto& f : fibers) {
      if (strcmp(f.op, fibers[0].op)) die("threads of one block meet in different barriers");
      sum += f.value;
    }
    for (auto& f : fibers) {
      f.state = RUN;
      f.value = sum;
    }
    return;
  }
  bool any = false;
  for (size_t w0 = 0; w0 < n; w0 += 32) {
    for (size_t i = w0; i < std::min(n, w0 + 32); i++) {
      if (fibers[i].state != WARP) continue;
      const unsigned m = fibers[i].mask;
      bool complete = true;
      for (int l = 0; l < 32; l++) {
        if (!(m >> l & 1)) continue;
        const size_t j = w0 + l;
        if (j >= n) die("mask names a lane the block does not have");
        if (fibers[j].state != WARP || fibers[j].mask != m) {
          complete = false;
          break;
        }
        if (strcmp(fibers[j].op, fibers[i].op)) die("lanes of one mask meet in different warp collectives");
      }
      if (!complete) continue;
      for (int l = 0; l < 32; l++)
        if (m >> l & 1) fibers[w0 + l].state = RUN;
      any = true;
    }
  }
  if (any) return;
  if (at_bar && done && at_bar + done == n)
    die("__syncthreads reached by some threads after others exited (refused: not portable)");
  die("deadlock: divergent barrier or warp collective");
}

inline uint64_t seed() {
  static uint64_t s = getenv("GOC_SEED") ? strtoull(getenv("GOC_SEED"), 0, 10) : 0;
  return s;
}

inline uint3 unflatten(size_t i, dim3 d) {
  return uint3{(unsigned)(i % d.x), (unsigned)(i / d.x % d.y), (unsigned)(i / d.x / d.y)};
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& fn) {
  GOC_IGN;
  const size_t n = (size_t)block.x * block.y * block.z;
  if (!n || n > 1024) {
    fprintf(stderr, "bad launch\n");
    abort();
  }
  gdim = grid;
  bdim = block;
  body = &fn;
  fibers.assign(n, Fiber());
  std::mt19937_64 rng(seed());
  static std::vector<char*> stacks;
  while (stacks.size() < n)
    stacks.push_back((char*)mmap(0, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
#ifdef GOC_TSAN
  main_tsan = __tsan_get_current_fiber();
  // kept for all launches: making one is slow, and tok_start and tok_end report the launch order to TSan
  static std::vector<void*> tsan_fibers;
  while (tsan_fibers.size() < n) tsan_fibers.push_back(__tsan_create_fiber(1));
#endif
  std::vector<size_t> blocks((size_t)grid.x * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = i;
  if (seed()) std::shuffle(blocks.begin(), blocks.end(), rng);
  std::vector<int> order(n);
  for (size_t i = 0; i < n; i++) order[i] = i;

  for (size_t bi : blocks) {
    bidx = unflatten(bi, grid);
#ifndef GOC_ASAN  // under ASan the section holds redzones: leave it
    if (__start_goc_shared)
      for (char* p = __start_goc_shared; p < __stop_goc_shared; p++) *p = (char)0xFF;
#endif
    GOC_REL(&tok_start);
    for (size_t i = 0; i < n; i++) {
      Fiber& f = fibers[i];
      f.state = RUN;
      f.op = nullptr;
      f.linear = i;
      f.tid = unflatten(i, block);
      f.stack = stacks[i];
      void** s = (void**)(f.stack + STACK_BYTES - 64);
      *--s = nullptr;        // keeps the stack aligned as after a call
      *--s = (void*)entry;   // goc_switch returns here
      for (int k = 0; k < 6; k++) *--s = nullptr;  // six callee-saved registers
      f.sp = s;
#ifdef GOC_TSAN
      f.tsan = tsan_fibers[i];
#endif
    }
    size_t done = 0;
    while (done < n) {
      if (seed()) std::shuffle(order.begin(), order.end(), rng);
      bool ran = false;
      done = 0;
      for (int i : order) {
        if (fibers[i].state == RUN) {
          to_fiber(fibers[i]);
          ran = true;
        }
        done += fibers[i].state == DONE;
      }
      if (done < n && !ran) try_release();
    }
    GOC_ACQ(&tok_end);
  }
  GOC_CHK;
}

template <class T>
T shfl(const char* op, unsigned mask, T v, int src_lane) {
  static_assert(sizeof(T) <= 16);
  GOC_IGN;
  Fiber& f = *cur;
  memcpy(f.val, &v, sizeof v);
  meet(op, mask);
  if (!(mask >> src_lane & 1)) die("shuffle reads a lane outside the mask");
  T r;
  memcpy(&r, fibers[(f.linear & ~31) + src_lane].val, sizeof r);
  meet(op, mask);  // second meeting, so nobody overwrites val early
  GOC_CHK;
  return r;
}

GOC_NO_TSAN inline uint3 tid() { return cur->tid; }
GOC_NO_TSAN inline int lane() { return cur->linear & 31; }
GOC_NO_TSAN inline uint3 blk() { return bidx; }

}  // namespace goc

// ---- built-in variables and functions (add what a kernel needs: a missing one is a compile error) ----
#define threadIdx (goc::tid())
#define blockIdx (goc::blk())
#define blockDim (goc::bdim)
#define gridDim (goc::gdim)
#define warpSize 32

inline void __syncthreads() { goc::block_barrier("__syncthreads", 0); }
inline int __syncthreads_count(int predicate) { return goc::block_barrier("__syncthreads_count", predicate != 0); }

template <class T>
T __shfl_xor_sync(unsigned m, T v, int x, int width = 32) {
  const int l = goc::lane();
  int s = l ^ x;
  if ((s & ~(width - 1)) > (l & ~(width - 1))) s = l;
  return goc::shfl("__shfl_xor_sync", m, v, s);
}

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
using std::isnan;
