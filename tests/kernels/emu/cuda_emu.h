// Runs CUDA C++ kernels on the CPU for tests: one fiber per CUDA thread, blocks one after another.
// Subset: threadIdx & co, static/dynamic shared memory, __syncthreads, full-mask or partial-mask warp
// shuffles/votes, atomics, float4/uint4, bf16. Finds: divergent barriers, barrier deadlocks; with
// -fsanitize=address out-of-bounds, with =undefined misaligned vector access, with =thread
// shared/global-memory races (fibers are announced to the sanitizers).
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#if defined(__SANITIZE_THREAD__)
extern "C" { void* __tsan_get_current_fiber(void); void* __tsan_create_fiber(unsigned); void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned); void __tsan_acquire(void*); void __tsan_release(void*); }
#endif
#if defined(__SANITIZE_ADDRESS__)
extern "C" { void __sanitizer_start_switch_fiber(void**, const void*, size_t); void __sanitizer_finish_switch_fiber(void*, const void**, size_t*); }
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static thread_local
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct dim3 { unsigned x, y, z; constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {} };
struct uint3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float a, float b) { return {a, b}; }
inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
using cudaStream_t = void*;
using cudaError_t = int;

#if defined(__SANITIZE_THREAD__)
#define EMU_NOSAN __attribute__((no_sanitize("thread"), noinline))
#define EMU_TSAN(...) __VA_ARGS__
#else
#define EMU_NOSAN
#define EMU_TSAN(...)
#endif

namespace emu {
[[noreturn]] inline void die(const char* why, int t) { fprintf(stderr, "cuda_emu: %s (thread %d)\n", why, t); abort(); }
enum State { READY, AT_BARRIER, AT_WARP, DONE };
struct Fiber {
  ucontext_t boot; jmp_buf jb; bool started = false; State st = READY; uint3 tid{}; int linear = 0;
  unsigned wmask = 0; int wop = 0; uint64_t wval = 0; void* san = nullptr; void* fake = nullptr;
  // For the thread sanitizer: a meeting (of a block or of lanes) orders what lay before it, not what its members do
  // next while others still wait to be resumed. So even and odd meetings have objects of their own.
  unsigned barriers = 0, meets = 0, met = 0; int64_t meet_obj[2] = {};
};
struct Block {
  std::vector<Fiber> f; std::vector<char> stacks; std::vector<unsigned char> dyn; std::function<void()> body;
  dim3 block, grid; uint3 bid{}; Fiber* cur = nullptr; jmp_buf sched; int live = 0; void* san = nullptr; void* fake = nullptr;
  uint64_t slots[64][32]; const void* sb = nullptr; size_t sl = 0; int64_t sync_obj[2] = {}, start_obj = 0, end_obj = 0;
  static constexpr size_t STACK = 64 * 1024;
};
inline thread_local Block* B = nullptr;

EMU_NOSAN inline void leave_hooks(Fiber* to) {
  (void)to;
  EMU_TSAN(__tsan_switch_to_fiber(to ? to->san : B->san, 1);)
}
EMU_NOSAN inline void yield() {  // fiber -> scheduler
  Fiber* me = B->cur;
  if (_setjmp(me->jb) == 0) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(me->st == DONE ? nullptr : &me->fake, B->sb, B->sl);
#endif
    leave_hooks(nullptr);
    _longjmp(B->sched, 1);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake, nullptr, nullptr);
#endif
}
EMU_NOSAN inline void entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &B->sb, &B->sl);
#endif
  EMU_TSAN(__tsan_acquire(&B->start_obj);)
  B->body();
  EMU_TSAN(__tsan_release(&B->end_obj);)
  B->cur->st = DONE; --B->live;
  yield();
}
EMU_NOSAN inline void resume(Fiber& f) {
  B->cur = &f;
  if (_setjmp(B->sched) == 0) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&B->fake, B->stacks.data() + size_t(f.linear) * Block::STACK, Block::STACK);
#endif
    leave_hooks(&f);
    if (!f.started) { f.started = true; setcontext(&f.boot); }
    _longjmp(f.jb, 1);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(B->fake, nullptr, nullptr);
#endif
}
EMU_NOSAN inline void syncthreads() {
  const unsigned parity = B->cur->barriers++ & 1; (void)parity;
  EMU_TSAN(__tsan_release(&B->sync_obj[parity]);)
  B->cur->st = AT_BARRIER; yield();
  EMU_TSAN(__tsan_acquire(&B->sync_obj[parity]);)
}
// all lanes of mask meet; each leaves its value, gets the table of the warp's values
template <class T> EMU_NOSAN inline T warp_exchange(int op, unsigned mask, T v, const std::function<T(const uint64_t*, int)>& pick) {
  static_assert(sizeof(T) <= 8);
  Fiber* me = B->cur; const int lane = me->linear & 31, warp = me->linear >> 5;
  if (!(mask >> lane & 1)) die("lane not in its own mask", me->linear);
  uint64_t raw = 0; memcpy(&raw, &v, sizeof(T));
  me->wmask = mask; me->wop = op; me->wval = raw; me->st = AT_WARP;
  EMU_TSAN(__tsan_release(&me->meet_obj[me->meets & 1]);)
  yield();
  EMU_TSAN(for (unsigned k = 0; k < 32 && warp * 32 + k < B->f.size(); ++k) if (mask >> k & 1) { Fiber& o = B->f[warp * 32 + k]; __tsan_acquire(&o.meet_obj[o.met]); })
  return pick(B->slots[warp], lane);
}
EMU_NOSAN inline bool release_warps() {  // every lane named in a mask waits in the same collective -> go on
  bool any = false; const int n = int(B->f.size());
  for (int w = 0; w * 32 < n; ++w) for (int l = 0; l < 32 && w * 32 + l < n; ++l) {
    Fiber& a = B->f[w * 32 + l];
    if (a.st != AT_WARP) continue;
    bool ok = true;
    for (int k = 0; k < 32 && ok; ++k) if (a.wmask >> k & 1) {
      if (w * 32 + k >= n) continue;                        // lanes past the block's end never exist
      Fiber& b = B->f[w * 32 + k];
      if (b.st == DONE) die("warp collective names an exited lane", a.linear);
      if (b.st == AT_WARP && (b.wmask != a.wmask || b.wop != a.wop)) die("lanes of one warp in different collectives", a.linear);
      ok = b.st == AT_WARP;
    }
    if (!ok) continue;
    for (int k = 0; k < 32; ++k) if (a.wmask >> k & 1 && w * 32 + k < n) B->slots[w][k] = B->f[w * 32 + k].wval;
    for (int k = 0; k < 32; ++k) if (a.wmask >> k & 1 && w * 32 + k < n) { Fiber& b = B->f[w * 32 + k]; b.st = READY; b.met = b.meets++ & 1; }
    any = true;
  }
  return any;
}
inline unsigned& rng() { static unsigned s = getenv("EMU_SEED") ? unsigned(atoi(getenv("EMU_SEED"))) : 0; return s; }
inline unsigned next_rand() { unsigned& s = rng(); s = s * 1664525u + 1013904223u; return s >> 8; }

template <class F> EMU_NOSAN inline void launch(dim3 grid, dim3 block, size_t dyn, F&& fn) {
  const int n = int(block.x * block.y * block.z); const long nb = long(grid.x) * grid.y * grid.z;
  if (n > 1024) die("more than 1024 threads per block", n);
  if (nb == 0 || n == 0) die("empty grid or block", 0);
  if (grid.y > 65535 || grid.z > 65535) die("grid.y and grid.z stop at 65535", 0);
  if (dyn > 227 * 1024) die("too much dynamic shared memory", int(dyn));
  auto blk = std::make_unique<Block>(); B = blk.get();
  B->block = block; B->grid = grid; B->f.resize(n); B->stacks.resize(size_t(n) * Block::STACK);
  B->body = fn;
  std::vector<long> order(nb); for (long i = 0; i < nb; ++i) order[i] = i;
  if (rng()) for (long i = nb - 1; i > 0; --i) std::swap(order[i], order[next_rand() % (i + 1)]);
  EMU_TSAN(B->san = __tsan_get_current_fiber(); for (auto& f : B->f) f.san = __tsan_create_fiber(0);)
  std::vector<int> ord(n);
  for (long q : order) {
    B->bid = {unsigned(q % grid.x), unsigned(q / grid.x % grid.y), unsigned(q / (long(grid.x) * grid.y))};
    B->dyn.assign(dyn + 16, 0xAB); B->live = n;             // poison, CUDA does not zero it
    for (int i = 0; i < n; ++i) {
      Fiber& f = B->f[i]; f.started = false; f.st = READY; f.linear = i; ord[i] = i;
      f.tid = {unsigned(i) % block.x, unsigned(i) / block.x % block.y, unsigned(i) / (block.x * block.y)};
      getcontext(&f.boot); f.boot.uc_stack.ss_sp = B->stacks.data() + size_t(i) * Block::STACK;
      f.boot.uc_stack.ss_size = Block::STACK; f.boot.uc_link = nullptr; makecontext(&f.boot, entry, 0);
    }
    if (rng()) for (int i = n - 1; i > 0; --i) std::swap(ord[i], ord[next_rand() % (i + 1)]);
    EMU_TSAN(__tsan_release(&B->start_obj);)
    while (B->live) {
      bool ran = false;
      for (int i : ord) if (B->f[i].st == READY) { resume(B->f[i]); ran = true; }
      if (!B->live) break;
      if (release_warps()) continue;
      int at = 0, done = 0; for (auto& f : B->f) { at += f.st == AT_BARRIER; done += f.st == DONE; }
      if (at && at + done == n) {
        if (done) die("__syncthreads reached by only part of the block (others exited)", done);
        for (auto& f : B->f) f.st = READY;
      } else if (!ran) die("deadlock: barrier and warp collective wait for each other", at);
    }
    EMU_TSAN(__tsan_acquire(&B->end_obj);)
  }
  EMU_TSAN(for (auto& f : B->f) __tsan_destroy_fiber(f.san);)
  B = nullptr;
}
}  // namespace emu

#define threadIdx (emu::B->cur->tid)
#define blockIdx (emu::B->bid)
#define blockDim (emu::B->block)
#define gridDim (emu::B->grid)
#define warpSize 32
#define SHARED_DYN(T, name) T* name = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(emu::B->dyn.data()) + 15) & ~uintptr_t(15))
#define LAUNCH(kernel, grid, block, smem, stream, ...) ((void)(stream), emu::launch(grid, block, smem, [=] { kernel(__VA_ARGS__); }))
inline void __syncthreads() { emu::syncthreads(); }
inline void __syncwarp(unsigned m = 0xffffffffu) { emu::warp_exchange<int>(0, m, 0, [](const uint64_t*, int) { return 0; }); }
template <class T> inline T emu_from(uint64_t r) { T v; memcpy(&v, &r, sizeof(T)); return v; }
template <class T> inline T __shfl_xor_sync(unsigned m, T v, int x, int = 32) { return emu::warp_exchange<T>(1, m, v, [=](const uint64_t* s, int l) { return (m >> (l ^ x) & 1) ? emu_from<T>(s[l ^ x]) : v; }); }
template <class T> inline T __shfl_down_sync(unsigned m, T v, int d, int w = 32) { return emu::warp_exchange<T>(2, m, v, [=](const uint64_t* s, int l) { const int k = l + d; return k / w == l / w && k < 32 && (m >> k & 1) ? emu_from<T>(s[k]) : v; }); }
template <class T> inline T __shfl_up_sync(unsigned m, T v, int d, int w = 32) { return emu::warp_exchange<T>(3, m, v, [=](const uint64_t* s, int l) { const int k = l - d; return k >= 0 && k / w == l / w ? emu_from<T>(s[k]) : v; }); }
template <class T> inline T __shfl_sync(unsigned m, T v, int src, int w = 32) { return emu::warp_exchange<T>(4, m, v, [=](const uint64_t* s, int l) { return emu_from<T>(s[l / w * w + src % w]); }); }
inline unsigned __ballot_sync(unsigned m, bool p) { return emu::warp_exchange<unsigned>(5, m, p, [=](const uint64_t* s, int) { unsigned r = 0; for (int k = 0; k < 32; ++k) if (m >> k & 1 && s[k]) r |= 1u << k; return r; }); }
template <class T> inline unsigned __match_any_sync(unsigned m, T v) { return emu::warp_exchange<uint64_t>(6, m, uint64_t(v), [=](const uint64_t* s, int l) { uint64_t r = 0; for (int k = 0; k < 32; ++k) if (m >> k & 1 && s[k] == s[l]) r |= 1u << k; return r; }); }
inline bool __any_sync(unsigned m, bool p) { return __ballot_sync(m, p) != 0; }
inline bool __all_sync(unsigned m, bool p) { return __ballot_sync(m, p) == m; }
inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T atomicAdd(T* p, T v) {
  if constexpr (std::is_floating_point_v<T>) { using U = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>; U* q = reinterpret_cast<U*>(p); U o = __atomic_load_n(q, __ATOMIC_RELAXED), n; do { n = std::bit_cast<U>(T(std::bit_cast<T>(o) + v)); } while (!__atomic_compare_exchange_n(q, &o, n, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); return std::bit_cast<T>(o); }
  else return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
}
template <class T> inline T atomicMax(T* p, T v) { T o = __atomic_load_n(p, __ATOMIC_RELAXED); while (o < v && !__atomic_compare_exchange_n(p, &o, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {} return o; }
template <class T> inline T atomicCAS(T* p, T c, T v) { __atomic_compare_exchange_n(p, &c, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); return c; }
template <class T> inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }
inline float __uint_as_float(unsigned u) { return std::bit_cast<float>(u); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }

struct __nv_bfloat16 { uint16_t b; __nv_bfloat16() = default; explicit __nv_bfloat16(float f); operator float() const { return std::bit_cast<float>(uint32_t(b) << 16); } };
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  uint32_t u = std::bit_cast<uint32_t>(f); __nv_bfloat16 r;
  r.b = (u & 0x7fffffffu) > 0x7f800000u ? 0x7fff : uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
  return r;
}
inline __nv_bfloat16::__nv_bfloat16(float f) { *this = __float2bfloat16_rn(f); }
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline float __bfloat162float(__nv_bfloat16 v) { return float(v); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return v.b; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { __nv_bfloat16 r; r.b = u; return r; }

struct __half { _Float16 h; };
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline float __half2float(__half v) { return static_cast<float>(v.h); }
