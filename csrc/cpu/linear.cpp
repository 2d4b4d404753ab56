// y = x Wᵀ in bf16 for the few rows of a decode step, from the weight as it lies: rows of W along the inputs, as rows of x. See kernels/linear.py.
//
// Such a product takes as long as reading W. So W goes by once, a few of its rows at a time against all rows of x, and while these are
// multiplied the next are fetched. An output is one vector of partial sums over the inputs, in order, then the sum of its lanes:
// the same number for any number of rows and threads.
#include <type_traits>
#include <vector>

#include "../op.h"

namespace {

constexpr int64_t block_rows = 64;          // rows of x at a time: with a piece of W they stay in the second-level cache
constexpr int64_t piece_bytes = 64 * 1024;  // of W
constexpr int64_t line = 64;

struct Product {
  const bf16 *x, *w;
  bf16* y;
  int64_t in, out, x_stride, w_stride, y_stride;
};

// fn(std::integral_constant<int, C>) of the largest listed constant up to n; returns it.
template <int C, int... Less, class F>
INLINE int at_most(int64_t n, F&& fn) {
  if constexpr (sizeof...(Less) > 0)
    if (n < C) return at_most<Less...>(n, fn);
  fn(std::integral_constant<int, C>{});
  return C;
}

// Rows [0, rows) of x against rows [begin, end) of W, tile by tile: `columns` rows of W (C) by `pick` rows of x (R).
template <class Tile>
void sweep_outputs(const Tile& tile, const Product& a, int64_t rows, int64_t begin, int64_t end) {
  const int64_t steps = std::max<int64_t>(1, (a.in + Tile::step - 1) / Tile::step);
  for (int64_t n = begin; n < end;) {
    n += tile.columns(rows, end - n, [&](auto columns) {
      constexpr int C = columns;
      // The next rows of W are fetched in even parts, some lines a step: all at once they would find no free place on the way to memory.
      const char* next = reinterpret_cast<const char*>(a.w + (n + C) * a.w_stride);
      const int64_t lines = (C * a.in * int64_t(sizeof(bf16)) + line - 1) / line, tiles = (rows + Tile::rows(C) - 1) / Tile::rows(C);
      at_most<8, 4, 2, 1>(lines / (tiles * steps) + 1, [&](auto part) {
        for (int64_t m = 0; m < rows; next += part * steps * line)
          m += tile.template pick<C>(rows - m, [&](auto taken) { tile.template run<taken, C, part>(a, m, n, next); });
      });
    });
  }
}

template <int Lines>
INLINE const char* fetch(const char* next) {
  for (int i = 0; i < Lines; ++i) __builtin_prefetch(next + i * line, 0, 3);
  return next + Lines * line;
}

// VW outputs, 4 columns of VW / 4 rows, by products in fp32. For processors without sums of bf16 products.
struct Widened {
  static constexpr int64_t step = 2 * VW;
  static constexpr int rows(int) { return VW / 4; }
  const int64_t padded;
  std::vector<float> x;  // [rows, padded], the inputs of each step in the order of load_two, zeros past the end

  Widened(const Product& a, int64_t rows) : padded((a.in + step - 1) / step * step), x(rows * padded) {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t k = 0; k < a.in; k += step) {
        float* to = x.data() + m * padded + k;
        vf even, odd;
        load_step(a.x + m * a.x_stride, k, a.in, even, odd);
        store(to, even);
        store(to + VW, odd);
      }
  }

  INLINE void load_step(const bf16* row, int64_t k, int64_t in, vf& even, vf& odd) {
    if (k + step <= in) return load_two(row + k, even, odd);
    bf16 rest[step] = {};
    memcpy(rest, row + k, size_t(in - k) * sizeof(bf16));
    load_two(rest, even, odd);
  }

  template <class F>
  INLINE int columns(int64_t, int64_t left, F&& fn) {
    return at_most<4, 1>(left, fn);
  }
  template <int, class F>
  INLINE int pick(int64_t left, F&& fn) {
    if constexpr (VW == 16) return at_most<4, 3, 2, 1>(left, fn);
    return at_most<VW / 4, 1>(left, fn);
  }

  template <int R, int C, int Lines>
  inline __attribute__((always_inline)) void run(const Product& a, int64_t m, int64_t n, const char* next) const {
    const float* from = x.data() + m * padded;
    const bf16* w = a.w + n * a.w_stride;
    vf sum[VW];
    for (vf& each : sum) each = splat(0.f);
    for (int64_t k = 0; k < a.in; k += step) {
      next = fetch<Lines>(next);
      for (int c = 0; c < C; ++c) {
        vf even, odd;
        load_step(w + c * a.w_stride, k, a.in, even, odd);
        for (int r = 0; r < R; ++r) {
          sum[r * 4 + c] += load(from + r * padded + k) * even;
          sum[r * 4 + c] += load(from + r * padded + k + VW) * odd;
        }
      }
    }
    const vf total = row_sums(sum);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) put(a.y + (m + r) * a.y_stride + n + c, total[r * 4 + c]);
  }
};

#if defined(__AVX512BF16__)

// Lane by lane a 128-bit lane's sums of a, b, c and d.
INLINE __m512 sums_of_four(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  return _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
}

// Lane i is the sum of x[i]'s lanes.
INLINE __m256 sums_of_eight(const __m512* x) {
  const __m512 low = sums_of_four(x[0], x[1], x[2], x[3]), high = sums_of_four(x[4], x[5], x[6], x[7]);
  const __m512 halves = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x44), _mm512_shuffle_f32x4(low, high, 0xee));
  return _mm512_castps512_ps256(_mm512_add_ps(_mm512_shuffle_f32x4(halves, halves, 0x08), _mm512_shuffle_f32x4(halves, halves, 0x0d)));
}

// Up to 24 outputs by the processor's own sums of bf16 products: 6 columns of 4 rows for few rows, else 8 columns of 3.
struct Dotted {
  static constexpr int64_t step = 32;
  Dotted(const Product&, int64_t) {}
  static constexpr int rows(int columns) { return columns == 8 ? 3 : 4; }
  template <class F>
  INLINE int columns(int64_t rows, int64_t left, F&& fn) {
    return rows < 4 || rows > 8 ? at_most<8, 1>(left, fn) : at_most<6, 1>(left, fn);
  }
  template <int C, class F>
  INLINE int pick(int64_t left, F&& fn) {
    if constexpr (C == 8) return at_most<3, 2, 1>(left, fn);
    return at_most<4, 3, 2, 1>(left, fn);
  }

  template <int R, int C, int Lines>
  INLINE void run(const Product& a, int64_t m, int64_t n, const char* next) {
    const bf16 *x = a.x + m * a.x_stride, *w = a.w + n * a.w_stride;
    __m512 sum[R][8];
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < 8; ++c) sum[r][c] = _mm512_setzero_ps();
    // Three pointers of which each reaches three columns: with one a column, general registers run out and accumulators land on the stack.
    const int64_t x_stride = a.x_stride, w_stride = a.w_stride;
    const bf16 *w0 = w, *w3 = w + (C > 3 ? 3 : 0) * w_stride, *w6 = w + (C > 6 ? 6 : 0) * w_stride;
    asm("" : "+r"(w3), "+r"(w6));
    const auto add = [&](const auto& part) {
      __m512bh rows[R];
      for (int r = 0; r < R; ++r) rows[r] = part(x + r * x_stride);
      for (int c = 0; c < C; ++c) {
        const __m512bh column = part((c < 3 ? w0 : c < 6 ? w3 : w6) + c % 3 * w_stride);
        for (int r = 0; r < R; ++r) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], rows[r], column);
      }
    };
    const int64_t rest = a.in % step;
    for (const bf16* end = x + (a.in - rest); x < end; x += step, w0 += step, w3 += step, w6 += step) {
      next = fetch<Lines>(next);
      add([](const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); });
    }
    if (rest) add([&](const bf16* p) { return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32(1) << rest) - 1, p); });
    for (int r = 0; r < R; ++r) {
      const __m128i rounded = (__m128i)_mm256_cvtneps_pbh(sums_of_eight(sum[r]));
      _mm_mask_storeu_epi16(a.y + (m + r) * a.y_stride + n, (1 << C) - 1, rounded);
    }
  }
};

using Tiles = Dotted;
#else
using Tiles = Widened;
#endif

Tensor linear_rows(const Tensor& x, const Tensor& weight) {
  const int64_t rows = x.size(0), in = x.size(1), out = weight.size(0);
  CHECK_SIZES(weight, out, in);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16,
                  "trialign: linear_rows needs bfloat16");
  STD_TORCH_CHECK(in == 0 || (x.stride(1) == 1 && weight.stride(1) == 1), "trialign: rows of x and of the weight must be contiguous");
  Tensor result = fresh(x, {rows, out}, x.scalar_type());
  Product a{::in<bf16>(x), ::in<bf16>(weight), ::out<bf16>(result), in, out, x.stride(0), weight.stride(0), out};
  for (int64_t first = 0; first < rows; first += block_rows) {
    const int64_t count = std::min(block_rows, rows - first);
    const Tiles tiles(a, count);
    pieces(out, std::max<int64_t>(8, piece_bytes / std::max<int64_t>(1, in * 2) / 8 * 8),
           [&](int64_t begin, int64_t end) { sweep_outputs(tiles, a, count, begin, end); });
    a.x += count * a.x_stride;
    a.y += count * out;
  }
  return result;
}

}  // namespace

TRIALIGN_OPS(ops) { ops.add("linear_rows(Tensor x, Tensor weight) -> Tensor", TORCH_BOX(&linear_rows)); }
