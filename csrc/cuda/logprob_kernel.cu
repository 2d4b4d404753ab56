// Online softmax statistics (m, s, t, y) of logits and the gradient from them. Formulas: kernels/logprob.py.
#include "../common.cuh"

namespace {

constexpr int threads = 256;

struct Stats {
  float m, s, t;
};
__device__ inline Stats join(Stats a, Stats b) {
  if (a.s == 0) return b;
  if (b.s == 0) return a;
  const float m = fmaxf(a.m, b.m), da = a.m - m, db = b.m - m, fa = expf(da), fb = expf(db);
  return {m, a.s * fa + b.s * fb, a.t * fa + a.s * (da * fa) + b.t * fb + b.s * (db * fb)};
}

// The stats joined with `count` more logits: one rescaling for all of them.
template <int count>
__device__ inline Stats take(Stats all, const float* z) {
  float m = all.m;
#pragma unroll
  for (int k = 0; k < count; ++k) m = fmaxf(m, z[k]);  // ignores a NaN, which still reaches s and t
  const float base = m == -INFINITY ? 0.f : m, drop = all.s == 0 ? 0.f : all.m - base, factor = expf(drop);
  Stats next{m, all.s * factor, all.t * factor + all.s * (drop * factor)};
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const float d = z[k] - base, p = expf(d);
    next.s += p;
    next.t += p == 0 ? 0.f : p * d;
  }
  return next;
}

template <typename T>
__global__ void __launch_bounds__(threads) update(float* stats, const T* logits, const int64_t* labels, int64_t n, int64_t v, int64_t stride,
                                                  int64_t vocab_start, float scale) {
  __shared__ Stats room[threads / 32];
  constexpr int size = Pack<T>::size;
  const int64_t row = blockIdx.x;
  const T* x = logits + row * stride;
  Stats all{-INFINITY, 0, 0};
  const int64_t packs = packable(x) ? v / size : 0;
  for (int64_t j = threadIdx.x; j < packs; j += threads) {
    const Pack<T> pack = reinterpret_cast<const Pack<T>*>(x)[j];
    float z[size];
#pragma unroll
    for (int k = 0; k < size; ++k) z[k] = get(pack.item[k]) * scale;
    all = take<size>(all, z);
  }
  for (int64_t j = packs * size + threadIdx.x; j < v; j += threads) {
    const float z = get(x[j]) * scale;
    all = take<1>(all, &z);
  }
#pragma unroll
  for (int step = 16; step; step >>= 1)
    all = join(all, Stats{__shfl_xor_sync(0xffffffffu, all.m, step), __shfl_xor_sync(0xffffffffu, all.s, step),
                          __shfl_xor_sync(0xffffffffu, all.t, step)});
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = all;
  __syncthreads();
  if (threadIdx.x != 0) return;
  Stats whole{stats[row], stats[n + row], stats[2 * n + row]};
  for (int warp = 0; warp < threads / 32; ++warp) whole = join(whole, room[warp]);
  stats[row] = whole.m;
  stats[n + row] = whole.s;
  stats[2 * n + row] = whole.t;
  const int64_t local = labels[row] - vocab_start;
  if (local >= 0 && local < v) stats[3 * n + row] += get(x[local]) * scale;
}

// Coefficients of one row: d logits = p (constant + slope d) + at_label [k = label].
struct Row {
  float m, log_s, constant, slope, at_label, scale;
  int64_t local;
};
__device__ inline float gradient_of(const Row& row, float x, int64_t column) {
  const float d = x * row.scale - row.m - row.log_s, p = expf(d);
  return (p == 0 ? 0.f : p * (row.constant + row.slope * d)) + (column == row.local ? row.at_label : 0.f);
}

// to may be from: every element is read by the thread that writes it.
template <typename T>
__global__ void __launch_bounds__(threads) gradient(const T* from, T* to, const int64_t* labels, const float* stats, const float* grad_logprob,
                                                    const float* grad_entropy, int64_t n, int64_t v, int64_t stride, int64_t vocab_start, float scale) {
  constexpr int size = Pack<T>::size;
  const int64_t i = blockIdx.x, first = int64_t(blockIdx.y) * threads + threadIdx.x, step = int64_t(gridDim.y) * threads;
  const float log_s = logf(stats[n + i]), entropy = log_s - stats[2 * n + i] / stats[n + i];
  const float g = grad_logprob ? grad_logprob[i] : 0.f, ge = grad_entropy ? grad_entropy[i] : 0.f;
  const Row row{stats[i], log_s, -(g + ge * entropy) * scale, -ge * scale, g * scale, scale, labels[i] - vocab_start};
  const T* x = from + i * stride;
  T* y = to + i * v;
  const int64_t packs = packable(x) && packable(y) ? v / size : 0;
  for (int64_t j = first; j < packs; j += step) {
    Pack<T> pack = reinterpret_cast<const Pack<T>*>(x)[j];
#pragma unroll
    for (int k = 0; k < size; ++k) put(&pack.item[k], gradient_of(row, get(pack.item[k]), j * size + k));
    reinterpret_cast<Pack<T>*>(y)[j] = pack;
  }
  for (int64_t j = packs * size + first; j < v; j += step) put(y + j, gradient_of(row, get(x[j]), j));
}

}  // namespace

extern "C" int launch_logprob_update(int dtype, float* stats, const void* logits, const int64_t* labels, int64_t n, int64_t v, int64_t stride,
                                     int64_t vocab_start, float scale, cudaStream_t stream) {
  BY_NUMBER(dtype, T, [&] {
    LAUNCH(update<T>, dim3(unsigned(n)), dim3(threads), 0, stream, stats, static_cast<const T*>(logits), labels, n, v, stride, vocab_start, scale);
  });
  return LAUNCH_STATUS();
}

// grad_logprob, grad_entropy: null for 0.
extern "C" int launch_logprob_backward(int dtype, const void* from, void* to, const int64_t* labels, const float* stats, const float* grad_logprob,
                                       const float* grad_entropy, int64_t n, int64_t v, int64_t stride, int64_t vocab_start, float scale,
                                       cudaStream_t stream) {
  const int64_t per_block = threads * 32, blocks = (v + per_block - 1) / per_block;
  BY_NUMBER(dtype, T, [&] {
    LAUNCH(gradient<T>, dim3(unsigned(n), unsigned(blocks < 65535 ? blocks : 65535)), dim3(threads), 0, stream, static_cast<const T*>(from),
           static_cast<T*>(to), labels, stats, grad_logprob, grad_entropy, n, v, stride, vocab_start, scale);
  });
  return LAUNCH_STATUS();
}
