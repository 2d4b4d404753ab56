// Causal attention over packed documents, forward and backward. See kernels/attention.py.
//
// One task is one document and one key/value head. Keys and values are widened to fp32 once a task; every product is computed
// in register tiles of MR rows x NV vectors. A tile covers only the keys its last row can see: the masked half is skipped.
#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "../op.h"
#include "softmax.h"

namespace {

constexpr int MR = 6;                       // rows of a register tile
constexpr int NV = VW == 16 ? 4 : 2;        // vectors of a register tile: MR * NV accumulators fit the register file
constexpr int PANEL = NV * VW;              // columns of a register tile

struct AttentionShape {
  int64_t heads, kv_heads, d;
  int64_t q_stride, k_stride, v_stride;     // elements between tokens; heads follow each other inside a token
  float scale;
  const float* slopes;                      // [heads] or null
  int64_t window;                           // keys a query sees, itself included
};

// C[m, n] (+)= sum_k A[m, k] B[k, n]; A has arbitrary strides (it is broadcast), rows of B and C are contiguous.
template <int M, int N>
INLINE void tile(int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  vf acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = splat(0.f);
  for (int64_t k = 0; k < K; ++k) {
    vf b[N];
    for (int n = 0; n < N; ++n) b[n] = load(B + k * ldb + n * VW);
    for (int m = 0; m < M; ++m) {
      const vf a = splat(A[m * am + k * ak]);
      for (int n = 0; n < N; ++n) acc[m][n] += a * b[n];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(C + m * ldc + n * VW, add ? load(C + m * ldc + n * VW) + acc[m][n] : acc[m][n]);
}

template <int M>
INLINE void tile_n(int n, int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb, float* C, int64_t ldc, bool add) {
  if constexpr (NV == 4) {
    if (n == 4) return tile<M, 4>(K, A, am, ak, B, ldb, C, ldc, add);
    if (n == 3) return tile<M, 3>(K, A, am, ak, B, ldb, C, ldc, add);
  }
  if (n == 2) return tile<M, 2>(K, A, am, ak, B, ldb, C, ldc, add);
  return tile<M, 1>(K, A, am, ak, B, ldb, C, ldc, add);
}

// m rows (1..MR) by n vectors (1..NV)
void tile_mn(int m, int n, int64_t K, const float* A, int64_t am, int64_t ak, const float* B, int64_t ldb, float* C, int64_t ldc,
                    bool add) {
  switch (m) {
    case 6: return tile_n<6>(n, K, A, am, ak, B, ldb, C, ldc, add);
    case 5: return tile_n<5>(n, K, A, am, ak, B, ldb, C, ldc, add);
    case 4: return tile_n<4>(n, K, A, am, ak, B, ldb, C, ldc, add);
    case 3: return tile_n<3>(n, K, A, am, ak, B, ldb, C, ldc, add);
    case 2: return tile_n<2>(n, K, A, am, ak, B, ldb, C, ldc, add);
    default: return tile_n<1>(n, K, A, am, ak, B, ldb, C, ldc, add);
  }
}

INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// rows x d of T, widened into rows x dp of float, zeros past d
template <typename T>
void widen(const T* x, int64_t stride, int64_t rows, int64_t d, int64_t dp, float scale, float* out) {
  for (int64_t r = 0; r < rows; ++r, x += stride, out += dp) {
    int64_t c = 0;
    for (; c + VW <= d; c += VW) store(out + c, load(x + c) * scale);
    for (; c < d; ++c) out[c] = get(x + c) * scale;
    for (; c < dp; ++c) out[c] = 0.f;
  }
}

// rows x dp of float -> panels [ceil(rows / PANEL)][d][PANEL] of the transpose, zeros past the last row
void transpose_panels(const float* x, int64_t rows, int64_t d, int64_t dp, float* out) {
  for (int64_t r0 = 0; r0 < rows; r0 += PANEL, out += d * PANEL)
    for (int64_t c = 0; c < d; ++c)
      for (int64_t r = 0; r < PANEL; ++r) out[c * PANEL + r] = r0 + r < rows ? x[(r0 + r) * dp + c] : 0.f;
}

template <typename T>
void narrow(const float* x, int64_t d, float scale, T* out) {
  int64_t c = 0;
  for (; c + VW <= d; c += VW) store(out + c, load(x + c) * scale);
  for (; c < d; ++c) put(out + c, x[c] * scale);
}

// S[r][j - lo] = A[r] . B^T[j] for rows r of the block that starts at query i0 and keys lo <= j <= last key a tile sees
void scores(const float* A, int64_t rows, int64_t i0, int64_t lo, int64_t d, int64_t dp, const float* panels, float* S, int64_t lds) {
  for (int64_t r = 0; r < rows; r += MR) {
    const int m = int(std::min<int64_t>(MR, rows - r));
    const int64_t end = i0 + r + m;         // keys [0, end) are seen by some row of this tile
    for (int64_t j = lo; j < end; j += PANEL) {
      const int n = int(std::min<int64_t>(NV, (end - j + VW - 1) / VW));
      tile_mn(m, n, d, A + r * dp, dp, 1, panels + j * d, PANEL, S + r * lds + (j - lo), lds, false);
    }
  }
}

// Visible keys of query i are [first, i]; scores of the others become weight 0 up to the end of their tile's last vector.
struct Row {
  int64_t first, end;
};
INLINE Row visible(int64_t i, int64_t window) { return {std::max<int64_t>(0, i - window + 1), i + 1}; }

void add_alibi(float* s, int64_t lo, int64_t i, float slope) {
  for (int64_t j = lo; j <= i; ++j) s[j - lo] += slope * float(j - i);
}

template <typename T>
void attention_forward_task(const AttentionShape& a, const T* q, const T* k, const T* v, int64_t start, int64_t length, int64_t kv_head,
                                   T* out, float* stats, std::vector<float>& scratch) {
  constexpr int64_t BLOCK = 8 * MR;
  const int64_t d = a.d, dp = round_up(d, VW), keys = round_up(length, PANEL), group = a.heads / a.kv_heads;
  scratch.resize(2 * keys * dp + keys * d + BLOCK * (2 * dp + keys));
  float* V = scratch.data();                // [length, dp]
  float* K = V + keys * dp;                 // [length, dp], then free
  float* KT = K + keys * dp;                // panels [., d, PANEL]
  float* Q = KT + keys * d;                 // [BLOCK, dp]
  float* O = Q + BLOCK * dp;                // [BLOCK, dp]
  float* S = O + BLOCK * dp;                // [BLOCK, keys]
  widen(k + start * a.k_stride + kv_head * d, a.k_stride, length, d, dp, 1.f, K);
  transpose_panels(K, length, d, dp, KT);
  widen(v + start * a.v_stride + kv_head * d, a.v_stride, length, d, dp, 1.f, V);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t i0 = 0; i0 < length; i0 += BLOCK) {
      const int64_t rows = std::min(BLOCK, length - i0);
      const int64_t lo = visible(i0, a.window).first / PANEL * PANEL;
      widen(q + (start + i0) * a.q_stride + h * d, a.q_stride, rows, d, dp, a.scale, Q);
      scores(Q, rows, i0, lo, d, dp, KT, S, keys);
      float inverse[BLOCK];
      for (int64_t r = 0; r < rows; ++r) {
        float* s = S + r * keys;
        const int64_t i = i0 + r;
        if (a.slopes) add_alibi(s, lo, i, a.slopes[h]);
        const Row row = visible(i, a.window);
        const int64_t stop = std::min(round_up(i0 + r / MR * MR + MR, VW), round_up(length, VW)) - lo;   // end of the tile's columns
        for (int64_t j = 0; j < row.first - lo; ++j) s[j] = -INFINITY;
        for (int64_t j = row.end - lo; j < stop; ++j) s[j] = -INFINITY;
        vf top = splat(-INFINITY);
        for (int64_t j = 0; j < stop; j += VW) top = vmax(top, load(s + j));
        const float peak = hmax(top);
        vf sum = splat(0.f);
        for (int64_t j = 0; j < stop; j += VW) {
          const vf e = weight(load(s + j) - peak);
          store(s + j, e);
          sum += e;
        }
        const float total = hsum(sum);
        float* stat = stats + ((start + i) * a.heads + h) * 2;
        stat[0] = peak;
        stat[1] = inverse[r] = 1.f / total;
      }
      for (int64_t r = 0; r < rows; r += MR) {
        const int m = int(std::min<int64_t>(MR, rows - r));
        for (int64_t c = 0; c < dp; c += PANEL) {
          const int n = int(std::min<int64_t>(NV, (dp - c) / VW));
          tile_mn(m, n, i0 + r + m - lo, S + r * keys, keys, 1, V + lo * dp + c, dp, O + r * dp + c, dp, false);
        }
      }
      for (int64_t r = 0; r < rows; ++r) narrow(O + r * dp, d, inverse[r], out + (start + i0 + r) * a.heads * d + h * d);
    }
}

template <typename T>
void attention_backward_task(const AttentionShape& a, const T* q, const T* k, const T* v, const float* stats, const T* grad,
                                    int64_t start, int64_t length, int64_t kv_head, T* dq, T* dk, T* dv, std::vector<float>& scratch) {
  constexpr int64_t BLOCK = 8 * MR;
  const int64_t d = a.d, dp = round_up(d, VW), keys = round_up(length, PANEL), group = a.heads / a.kv_heads;
  scratch.resize(4 * keys * dp + 2 * keys * d + BLOCK * (3 * dp + 2 * keys));
  float* K = scratch.data();                // [length, dp]
  float* V = K + keys * dp;                 // [length, dp], then free
  float* DK = V + keys * dp;                // [length, dp]
  float* DV = DK + keys * dp;               // [length, dp]
  float* KT = DV + keys * dp;               // panels [., d, PANEL]
  float* VT = KT + keys * d;
  float* Q = VT + keys * d;                 // [BLOCK, dp], times scale
  float* DO = Q + BLOCK * dp;               // [BLOCK, dp]
  float* DQ = DO + BLOCK * dp;              // [BLOCK, dp]
  float* P = DQ + BLOCK * dp;               // [BLOCK, keys]
  float* DS = P + BLOCK * keys;             // [BLOCK, keys]
  widen(k + start * a.k_stride + kv_head * d, a.k_stride, length, d, dp, 1.f, K);
  widen(v + start * a.v_stride + kv_head * d, a.v_stride, length, d, dp, 1.f, V);
  transpose_panels(K, length, d, dp, KT);
  transpose_panels(V, length, d, dp, VT);
  std::fill(DK, DK + 2 * keys * dp, 0.f);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h)
    for (int64_t i0 = 0; i0 < length; i0 += BLOCK) {
      const int64_t rows = std::min(BLOCK, length - i0), end = i0 + rows;
      const int64_t lo = visible(i0, a.window).first / PANEL * PANEL;
      widen(q + (start + i0) * a.q_stride + h * d, a.q_stride, rows, d, dp, a.scale, Q);
      widen(grad + (start + i0) * a.heads * d + h * d, a.heads * d, rows, d, dp, 1.f, DO);
      scores(Q, rows, i0, lo, d, dp, KT, P, keys);
      scores(DO, rows, i0, lo, d, dp, VT, DS, keys);
      for (int64_t r = 0; r < rows; ++r) {
        float *p = P + r * keys, *ds = DS + r * keys;
        const int64_t i = i0 + r;
        if (a.slopes) add_alibi(p, lo, i, a.slopes[h]);
        const Row row = visible(i, a.window);
        const int64_t stop = std::min(round_up(end, VW), round_up(length, VW)) - lo;   // dk and dv read every key up to the block's end
        const float* stat = stats + ((start + i) * a.heads + h) * 2;
        const int64_t from = (row.first - lo) / VW * VW;   // aligned: a row must not write into the next
        for (int64_t j = from; j < row.end - lo; j += VW) store(p + j, weight(load(p + j) - stat[0]) * stat[1]);
        for (int64_t j = 0; j < row.first - lo; ++j) p[j] = ds[j] = 0.f;
        for (int64_t j = row.end - lo; j < stop; ++j) p[j] = ds[j] = 0.f;
        vf sum = splat(0.f);
        for (int64_t j = from; j < row.end - lo; j += VW) sum += load(p + j) * load(ds + j);
        const float delta = hsum(sum);   // D_i as sum_j P_ij dP_ij: exact where dP is constant, and the output need not be kept
        for (int64_t j = from; j < row.end - lo; j += VW) store(ds + j, load(p + j) * (load(ds + j) - delta));
      }
      for (int64_t c = 0; c < dp; c += PANEL) {
        const int n = int(std::min<int64_t>(NV, (dp - c) / VW));
        for (int64_t r = 0; r < rows; r += MR) {
          const int m = int(std::min<int64_t>(MR, rows - r));
          tile_mn(m, n, i0 + r + m - lo, DS + r * keys, keys, 1, K + lo * dp + c, dp, DQ + r * dp + c, dp, false);
        }
        for (int64_t j = lo; j < end; j += MR) {
          const int m = int(std::min<int64_t>(MR, end - j));
          const int64_t r = std::max<int64_t>(0, j - i0);    // queries before key j do not see it
          tile_mn(m, n, rows - r, P + r * keys + (j - lo), 1, keys, DO + r * dp + c, dp, DV + j * dp + c, dp, true);
          tile_mn(m, n, rows - r, DS + r * keys + (j - lo), 1, keys, Q + r * dp + c, dp, DK + j * dp + c, dp, true);
        }
      }
      for (int64_t r = 0; r < rows; ++r) narrow(DQ + r * dp, d, a.scale, dq + (start + i0 + r) * a.heads * d + h * d);
    }
  for (int64_t j = 0; j < length; ++j) {
    narrow(DK + j * dp, d, 1.f, dk + ((start + j) * a.kv_heads + kv_head) * d);
    narrow(DV + j * dp, d, 1.f, dv + ((start + j) * a.kv_heads + kv_head) * d);
  }
}

// Runs task(document, kv_head, scratch) over all of them, longest documents first, threads taking the next one when free.
template <class F>
void for_each_task(const int64_t* starts, int64_t documents, int64_t kv_heads, const F& task) {
  std::vector<int64_t> order(documents);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return starts[x + 1] - starts[x] > starts[y + 1] - starts[y]; });
  std::atomic<int64_t> next{0};
  const int64_t tasks = documents * kv_heads;
  torch::stable::parallel_for(0, std::min<int64_t>(tasks, torch::stable::get_num_threads()), 1, [&](int64_t, int64_t) {
    std::vector<float> scratch;
    for (int64_t t; (t = next.fetch_add(1)) < tasks;) task(order[t / kv_heads], t % kv_heads, scratch);
  });
}

AttentionShape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t max_seqlen, double scale, const std::optional<Tensor>& slopes,
                        std::optional<int64_t> window) {
  const int64_t total = q.size(0), heads = q.size(1), kv_heads = k.size(1), d = q.size(2);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, heads, " query heads do not divide into groups over ", kv_heads, " key/value heads");
  CHECK_SIZES(k, total, kv_heads, d);
  CHECK_SIZES(v, total, kv_heads, d);
  CHECK_PACKED(slopes, ScalarType::Float, heads);
  STD_TORCH_CHECK(!window || *window >= 1, "a window of ", *window, " keys: a query sees at least itself");
  for (const Tensor* t : {&q, &k, &v})
    STD_TORCH_CHECK(t->stride(2) == 1 && t->stride(1) == d && t->scalar_type() == q.scalar_type(),
                    "q, k and v must have one dtype, and each token's heads side by side");
  const int64_t* starts = starts_of(cu_seqlens, q.size(0), max_seqlen);
  STD_TORCH_CHECK(starts[0] == 0 && starts[cu_seqlens.numel() - 1] == q.size(0), "cu_seqlens must run from 0 to ", q.size(0));
  constexpr int64_t all = INT64_MAX / 4;  // positions are added to it
  return {heads, kv_heads, d, q.stride(0), k.stride(0), v.stride(0), float(scale), slopes ? slopes->const_data_ptr<float>() : nullptr,
          std::min(window.value_or(all), all)};
}

const void* data(const Tensor& t) { return t.const_data_ptr(); }

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, int64_t max_seqlen, double scale,
                                             const std::optional<Tensor>& slopes, std::optional<int64_t> window) {
  const AttentionShape a = shape_of(q, k, v, cu_seqlens, max_seqlen, scale, slopes, window);
  Tensor out = fresh(q, {q.size(0), a.heads, a.d}, q.scalar_type()), stats = fresh(q, {q.size(0), a.heads, 2}, ScalarType::Float);
  const int64_t* starts = cu_seqlens.const_data_ptr<int64_t>();
  const auto run = [&]<typename T>(T*) {
    T* o = static_cast<T*>(out.mutable_data_ptr());
    float* l = stats.mutable_data_ptr<float>();
    const T *qp = static_cast<const T*>(data(q)), *kp = static_cast<const T*>(data(k)), *vp = static_cast<const T*>(data(v));
    for_each_task(starts, cu_seqlens.numel() - 1, a.kv_heads, [&](int64_t i, int64_t head, std::vector<float>& scratch) {
      attention_forward_task(a, qp, kp, vp, starts[i], starts[i + 1] - starts[i], head, o, l, scratch);
    });
  };
  BY_DTYPE(q, T, [&] { run(static_cast<T*>(nullptr)); });
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                      const Tensor& /* out: the GPU kernels need it */, const Tensor& stats, const Tensor& cu_seqlens, int64_t max_seqlen, double scale, const std::optional<Tensor>& slopes,
                                                      std::optional<int64_t> window) {
  const AttentionShape a = shape_of(q, k, v, cu_seqlens, max_seqlen, scale, slopes, window);
  CHECK_PACKED(grad, q.scalar_type(), q.size(0), a.heads, a.d);
  CHECK_PACKED(stats, ScalarType::Float, q.size(0), a.heads, 2);
  Tensor dq = fresh(q, {q.size(0), a.heads, a.d}, q.scalar_type());
  Tensor dk = fresh(q, {q.size(0), a.kv_heads, a.d}, q.scalar_type()), dv = fresh(q, {q.size(0), a.kv_heads, a.d}, q.scalar_type());
  const int64_t* starts = cu_seqlens.const_data_ptr<int64_t>();
  const auto run = [&]<typename T>(T*) {
    T *dqp = static_cast<T*>(dq.mutable_data_ptr()), *dkp = static_cast<T*>(dk.mutable_data_ptr()), *dvp = static_cast<T*>(dv.mutable_data_ptr());
    const T *qp = static_cast<const T*>(data(q)), *kp = static_cast<const T*>(data(k)), *vp = static_cast<const T*>(data(v));
    const T* g = static_cast<const T*>(data(grad));
    const float* l = stats.const_data_ptr<float>();
    for_each_task(starts, cu_seqlens.numel() - 1, a.kv_heads, [&](int64_t i, int64_t head, std::vector<float>& scratch) {
      attention_backward_task(a, qp, kp, vp, l, g, starts[i], starts[i + 1] - starts[i], head, dqp, dkp, dvp, scratch);
    });
  };
  BY_DTYPE(q, T, [&] { run(static_cast<T*>(nullptr)); });
  return {dq, dk, dv};
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, int max_seqlen, float scale, Tensor? alibi_slopes, int? window) -> (Tensor, Tensor)",
          TORCH_BOX(&attention_forward));
  ops.add("attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor cu_seqlens, int max_seqlen, float scale, "
          "Tensor? alibi_slopes, int? window) -> (Tensor, Tensor, Tensor)",
          TORCH_BOX(&attention_backward));
}
