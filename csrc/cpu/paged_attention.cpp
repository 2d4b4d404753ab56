// Decode attention over a paged key/value cache, and the write into it. See kernels/paged_attention.py.
#include <algorithm>
#include <vector>

#include "../op.h"
#include "softmax.h"

namespace {

struct Paged {
  int64_t heads, kv_heads, d, block;
  float scale;
  const float* slopes;       // [heads] or null
  int64_t window;            // keys a query sees, the last ones
};

template <typename T>
INLINE vf load_part(const T* p, int64_t n) {
  float lanes[VW] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = get(p + i);
  return load(lanes);
}

// rows[p]: where key (or value) p starts, in elements. S[g][p] = Q[g] . key p for G queries; written up to a multiple of VW.
template <int G, typename T>
void dots(const T* cache, const int64_t* rows, int64_t length, int64_t d, int64_t dp, const float* Q, float* S, int64_t lds) {
  for (int64_t p0 = 0; p0 < length; p0 += VW) {
    vf part[G][VW];
    for (int r = 0; r < VW; ++r) {
      const T* key = cache + rows[std::min(p0 + r, length - 1)];
      vf sum[G];
      for (int g = 0; g < G; ++g) sum[g] = splat(0.f);
      int64_t c = 0;
      for (; c + VW <= d; c += VW) {
        const vf x = load(key + c);
        for (int g = 0; g < G; ++g) sum[g] += x * load(Q + g * dp + c);
      }
      if (c < d) {
        const vf x = load_part(key + c, d - c);
        for (int g = 0; g < G; ++g) sum[g] += x * load(Q + g * dp + c);
      }
      for (int g = 0; g < G; ++g) part[g][r] = sum[g];
    }
    for (int g = 0; g < G; ++g) store(S + g * lds + p0, row_sums(part[g]));
  }
}

// O[g][c..c + N * VW) = sum_p S[g][p] value p
template <int G, int N, typename T>
void mix(const T* cache, const int64_t* rows, int64_t length, const float* S, int64_t lds, float* O, int64_t dp) {
  vf acc[G][N];
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) acc[g][n] = splat(0.f);
  for (int64_t p = 0; p < length; ++p) {
    const T* value = cache + rows[p];
    for (int n = 0; n < N; ++n) {
      const vf x = load(value + n * VW);
      for (int g = 0; g < G; ++g) acc[g][n] += splat(S[g * lds + p]) * x;
    }
  }
  for (int g = 0; g < G; ++g)
    for (int n = 0; n < N; ++n) store(O + g * dp + n * VW, acc[g][n]);
}

template <int G, typename T>
void mix_all(const T* cache, const int64_t* rows, int64_t length, int64_t d, int64_t dp, const float* S, int64_t lds, float* O) {
  int64_t c = 0;
  for (; c + 4 * VW <= d; c += 4 * VW) mix<G, 4>(cache + c, rows, length, S, lds, O + c, dp);
  for (; c + VW <= d; c += VW) mix<G, 1>(cache + c, rows, length, S, lds, O + c, dp);
  if (c == d) return;
  for (int g = 0; g < G; ++g) {
    vf acc = splat(0.f);
    for (int64_t p = 0; p < length; ++p) acc += splat(S[g * lds + p]) * load_part(cache + rows[p] + c, d - c);
    store(O + g * dp + c, acc);
  }
}

// G query heads of one key/value head; q and out point to the first of them.
template <int G, typename T>
void decode(const Paged& a, const T* q, const T* k_cache, const T* v_cache, const int64_t* rows, int64_t length, const float* slopes, T* out,
            std::vector<float>& scratch) {
  const int64_t d = a.d, dp = (d + VW - 1) / VW * VW, lds = (length + VW - 1) / VW * VW;
  scratch.resize(G * (2 * dp + lds));
  float *Q = scratch.data(), *O = Q + G * dp, *S = O + G * dp;
  for (int g = 0; g < G; ++g)
    for (int64_t c = 0; c < dp; ++c) Q[g * dp + c] = c < d ? get(q + g * d + c) * a.scale : 0.f;
  dots<G>(k_cache, rows, length, d, dp, Q, S, lds);
  float inverse[G];
  for (int g = 0; g < G; ++g) {
    float* s = S + g * lds;
    if (slopes)
      for (int64_t p = 0; p < length; ++p) s[p] += slopes[g] * float(p - (length - 1));
    for (int64_t p = length; p < lds; ++p) s[p] = -INFINITY;
    vf top = splat(-INFINITY);
    for (int64_t p = 0; p < lds; p += VW) top = vmax(top, load(s + p));
    const float peak = hmax(top);
    vf sum = splat(0.f);
    for (int64_t p = 0; p < lds; p += VW) {
      const vf e = weight(load(s + p) - peak);
      store(s + p, e);
      sum += e;
    }
    inverse[g] = 1.f / hsum(sum);
  }
  mix_all<G>(v_cache, rows, length, d, dp, S, lds, O);
  for (int g = 0; g < G; ++g)
    for (int64_t c = 0; c < d; ++c) put(out + g * d + c, O[g * dp + c] * inverse[g]);
}

template <typename T>
void decode_group(const Paged& a, const T* q, const T* k_cache, const T* v_cache, const int64_t* rows, int64_t length, int64_t head, T* out,
                  std::vector<float>& scratch) {
  int64_t left = a.heads / a.kv_heads;
  while (left > 0) {
    const float* slopes = a.slopes ? a.slopes + head : nullptr;
    const T* query = q + head * a.d;
    T* o = out + head * a.d;
    const int64_t taken = std::min<int64_t>(left, 4);
    if (taken == 4) decode<4>(a, query, k_cache, v_cache, rows, length, slopes, o, scratch);
    if (taken == 3) decode<3>(a, query, k_cache, v_cache, rows, length, slopes, o, scratch);
    if (taken == 2) decode<2>(a, query, k_cache, v_cache, rows, length, slopes, o, scratch);
    if (taken == 1) decode<1>(a, query, k_cache, v_cache, rows, length, slopes, o, scratch);
    left -= taken;
    head += taken;
  }
}

template <typename T>
void decode_batch(const Paged& a, const T* q, int64_t q_stride, const T* k_cache, const T* v_cache, const int32_t* tables, int64_t table_stride,
                  const int32_t* lengths, int64_t batch, T* out) {
  int64_t positions = 0;
  for (int64_t b = 0; b < batch; ++b) positions += std::min<int64_t>(lengths[b], a.window);
  const int64_t grain = std::max<int64_t>(1, 16384 * batch / std::max<int64_t>(1, positions * a.d));
  pieces(batch * a.kv_heads, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch;
    std::vector<int64_t> rows;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / a.kv_heads, kv = task % a.kv_heads;
      const int64_t seen = std::min<int64_t>(lengths[b], a.window), first = lengths[b] - seen;
      rows.clear();
      rows.reserve(seen);
      for (int64_t i = first / a.block; i * a.block < lengths[b]; ++i) {
        const int64_t start = i * a.block, page = tables[b * table_stride + i] * a.block;
        for (int64_t p = std::max(start, first); p < std::min<int64_t>(start + a.block, lengths[b]); ++p)
          rows.push_back(((page + p - start) * a.kv_heads + kv) * a.d);
      }
      decode_group(a, q + b * q_stride, k_cache, v_cache, rows.data(), seen, kv * (a.heads / a.kv_heads), out + b * a.heads * a.d, scratch);
    }
  });
}

// [n, heads, d] whose heads follow each other in memory
bool is_token_rows(const Tensor& x) { return x.stride(2) == 1 && x.stride(1) == x.size(2); }

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables, const Tensor& lengths, double scale,
                       const std::optional<Tensor>& slopes, std::optional<int64_t> window) {
  const int64_t batch = q.size(0), heads = q.size(1), d = q.size(2), blocks = k_cache.size(0), page = k_cache.size(1), kv_heads = k_cache.size(2);
  STD_TORCH_CHECK(page > 0 && kv_heads > 0 && heads % kv_heads == 0, heads, " query heads do not divide into groups over ", kv_heads,
                  " key/value heads");
  CHECK_PACKED(k_cache, q.scalar_type(), blocks, page, kv_heads, d);
  CHECK_PACKED(v_cache, q.scalar_type(), blocks, page, kv_heads, d);
  CHECK_PACKED(slopes, ScalarType::Float, heads);
  CHECK_PACKED(lengths, ScalarType::Int, batch);
  CHECK_SIZES(block_tables, batch, block_tables.size(1));
  const Paged a{heads, kv_heads, d, page, float(scale), slopes ? slopes->const_data_ptr<float>() : nullptr,
                window.value_or(INT64_MAX)};
  const int32_t *tables = block_tables.const_data_ptr<int32_t>(), *length = lengths.const_data_ptr<int32_t>();
  const int64_t stride = block_tables.stride(0);
  STD_TORCH_CHECK(block_tables.stride(1) == 1 && is_token_rows(q), "each query and each table must be contiguous");
  STD_TORCH_CHECK(a.window >= 1, "a window of ", a.window, " keys: a query sees at least itself");
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(length[b] >= 1 && length[b] <= block_tables.size(1) * a.block, "sequence ", b, " has length ", length[b], ", its table holds 1 to ",
                    block_tables.size(1) * a.block);
    for (int64_t i = 0; i * a.block < length[b]; ++i)
      STD_TORCH_CHECK(tables[b * stride + i] >= 0 && tables[b * stride + i] < blocks, "sequence ", b, " has block ", tables[b * stride + i],
                      ", the cache has ", blocks);
  }
  Tensor result = fresh(q, {batch, a.heads, a.d}, q.scalar_type());
  BY_DTYPE(q, T, [&] { decode_batch(a, in<T>(q), q.stride(0), in<T>(k_cache), in<T>(v_cache), tables, stride, length, batch, out<T>(result)); });
  return result;
}

void write_kv(const Tensor& k, const Tensor& v, Tensor k_cache, Tensor v_cache, const Tensor& slots) {
  const int64_t n = k.size(0), width = k.size(1) * k.size(2) * k.element_size(), capacity = k_cache.size(0) * k_cache.size(1);
  STD_TORCH_CHECK(is_token_rows(k) && is_token_rows(v) && k.scalar_type() == v.scalar_type(),
                  "keys and values must have one dtype, and each token's be contiguous");
  CHECK_SIZES(v, n, k.size(1), k.size(2));
  CHECK_PACKED(k_cache, k.scalar_type(), k_cache.size(0), k_cache.size(1), k.size(1), k.size(2));
  CHECK_PACKED(v_cache, k.scalar_type(), k_cache.size(0), k_cache.size(1), k.size(1), k.size(2));
  CHECK_PACKED(slots, ScalarType::Long, n);
  const int64_t* slot = slots.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) STD_TORCH_CHECK(slot[i] >= 0 && slot[i] < capacity, "slot ", slot[i], " of row ", i, " is outside the cache's ", capacity);
  const char *from_k = static_cast<const char*>(k.const_data_ptr()), *from_v = static_cast<const char*>(v.const_data_ptr());
  char *to_k = static_cast<char*>(k_cache.mutable_data_ptr()), *to_v = static_cast<char*>(v_cache.mutable_data_ptr());
  const int64_t k_stride = k.stride(0) * k.element_size(), v_stride = v.stride(0) * v.element_size();
  parallel(n, width, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      memcpy(to_k + slot[i] * width, from_k + i * k_stride, width);
      memcpy(to_v + slot[i] * width, from_v + i * v_stride, width);
    }
  });
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor lengths, float scale, Tensor? alibi_slopes, int? window) -> Tensor",
          TORCH_BOX(&paged_attention));
  ops.add("write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()", TORCH_BOX(&write_kv));
}
