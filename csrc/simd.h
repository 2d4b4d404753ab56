// Vectors of the machine's native width (16, 8 or 4 floats). One fixed 64-byte type would run 4-5 times slower on AVX2.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VW 16
#elif defined(__AVX2__)
#define VW 8
#else
#define VW 4
#endif
#define INLINE static inline __attribute__((always_inline))

// Anonymous: each SIMD level has types of its own.
namespace {

typedef float vf __attribute__((vector_size(VW * 4)));
typedef int32_t vi __attribute__((vector_size(VW * 4)));
typedef uint32_t vu __attribute__((vector_size(VW * 4)));
typedef uint16_t vh __attribute__((vector_size(VW * 2)));
struct bf16 {
  uint16_t bits;
};

INLINE vf splat(float x) { return vf{} + x; }
INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
// 16 to 32 bits and back, and the maximum: gcc 12 makes 2 to 5 instructions out of the generic form.
#if VW == 16
INLINE vu widen(vh h) { return (vu)_mm512_cvtepu16_epi32((__m256i)h); }
INLINE vh narrow(vu u) { return (vh)_mm512_cvtepi32_epi16((__m512i)u); }
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
INLINE float hsum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
#elif VW == 8
INLINE vu widen(vh h) { return (vu)_mm256_cvtepu16_epi32((__m128i)h); }
INLINE vh narrow(vu u) {
  const __m256i packed = _mm256_packus_epi32((__m256i)u, (__m256i)u);
  return (vh)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
#else
INLINE vu widen(vh h) { return __builtin_convertvector(h, vu); }
INLINE vh narrow(vu u) { return __builtin_convertvector(u, vh); }
INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }  // as the machine instructions: a NaN in b is kept, one in a is not
INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
#endif
#if VW != 16
INLINE float hsum(vf v) {
  float s = 0;
  for (int i = 0; i < VW; ++i) s += v[i];
  return s;
}
#endif
INLINE float hmax(vf v) {
  float s = v[0];
  for (int i = 1; i < VW; ++i) s = s > v[i] ? s : v[i];
  return s;
}
// Lane i of the result is the I-th of both vectors' 2 * VW lanes.
template <int... I>
INLINE vf shuffle(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vi{I...});
#endif
}
// shuffle by a rule: lane i of the result is lane rule(i).
template <class Rule, int... I>
INLINE vf shuffle_by(vf a, vf b, Rule, std::integer_sequence<int, I...>) {
  return shuffle(a, b, std::integer_sequence<int, Rule{}(I)...>{});
}
template <class Rule>
INLINE vf shuffle_by(vf a, vf b, Rule rule) {
  return shuffle_by(a, b, rule, std::make_integer_sequence<int, VW>{});
}
// Lane i of the result is lane i + S of v, 0 past the end.
template <int S>
INLINE vf shift(vf v) {
  return shuffle_by(v, vf{}, [](int i) { return i + S; });
}
INLINE vf interleave_low(vf a, vf b) {
  return shuffle_by(a, b, [](int i) { return i / 2 + (i % 2) * VW; });
}
INLINE vf interleave_high(vf a, vf b) {
  return shuffle_by(a, b, [](int i) { return VW / 2 + i / 2 + (i % 2) * VW; });
}

// Lane i of the result is the sum of x[i]'s lanes. Each round adds halves and interleaves two vectors into one.
INLINE vf row_sums(vf* x) {
  for (int width = VW / 2; width >= 1; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = interleave_low(x[i], x[i + width]) + interleave_high(x[i], x[i + width]);
  return x[0];
}

INLINE vf load(const bf16* p) {
  vh h;
  memcpy(&h, p, sizeof h);
  return (vf)(widen(h) << 16);
}
// 2 * VW entries in whatever order is cheapest: for sums and maxima.
INLINE void load_two(const float* p, vf& a, vf& b) {
  a = load(p);
  b = load(p + VW);
}
INLINE void load_two(const bf16* p, vf& a, vf& b) {  // the even ones and the odd ones
  vu u;
  memcpy(&u, p, sizeof u);
  a = (vf)(u << 16);
  b = (vf)(u & 0xffff0000u);
}
INLINE void store(bf16* p, vf v) {  // to nearest even; NaN stays NaN
  const vu u = (vu)v;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu kept = v == v ? rounded : (u >> 16) | 0x40u;
  const vh h = narrow(kept);
  memcpy(p, &h, sizeof h);
}
INLINE float get(const float* p) { return *p; }
INLINE float get(const bf16* p) { return std::bit_cast<float>(uint32_t(p->bits) << 16); }
INLINE void put(float* p, float v) { *p = v; }
INLINE void put(bf16* p, float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  p->bits = v == v ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : uint16_t((u >> 16) | 0x40u);
}
constexpr float exp_low = -87.3f;  // exp of it is the smallest normal float
constexpr float exp_high = 88.0f;
// About 1 ulp for x in [exp_low, exp_high]: x = n ln2 + r, a polynomial for e^r, n added to the exponent bits.
INLINE vf vexp(vf x) {
  constexpr float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const vf k = x * 1.44269504f + magic;
  const vf n = k - magic;
  vf r = x - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  vf p = r * 1.3814598788e-3f + 8.3687165752e-3f;
  p = p * r + 4.1668388993e-2f;
  p = p * r + 1.6666521132e-1f;
  p = p * r + 4.9999994040e-1f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return (vf)((vi)p + ((vi)k << 23));  // the bits of magic itself shift out
}

// A row in whole vectors and one rest: sweep(n, f) calls f(i, Full{}) and f(i, Rest{count}); load and store take either.
struct Full {};
struct Rest {
  int count;
};
template <class T>
INLINE vf load(const T* p, Full) {
  return load(p);
}
template <class T>
INLINE vf load(const T* p, Rest rest) {  // lanes past the end are 0
  T row[VW] = {};
  memcpy(row, p, size_t(rest.count) * sizeof(T));
  return load(row);
}
template <class T>
INLINE void store(T* p, vf v, Full) {
  store(p, v);
}
template <class T>
INLINE void store(T* p, vf v, Rest rest) {
  T row[VW];
  store(row, v);
  memcpy(p, row, size_t(rest.count) * sizeof(T));
}
INLINE vf keep(vf v, float, Full) { return v; }
INLINE vf keep(vf v, float other, Rest rest) {  // `other` in the lanes past the end
  for (int i = rest.count; i < VW; ++i) v[i] = other;
  return v;
}
template <class F>
INLINE void sweep(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + VW <= n; i += VW) f(i, Full{});
  if (i < n) f(i, Rest{int(n - i)});
}

}  // namespace
