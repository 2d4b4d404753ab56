// RMSNorm with or without the residual added first, forward and backward. Formulas: kernels/rms_norm.py.
#include "../op.h"

namespace {

constexpr int64_t block_rows = 64;  // rows of one partial sum of d weight: fixed, so the thread count does not change the result

// Four sums hide the latency of the addition.
template <class T>
INLINE float sum_of_squares(const T* x, int64_t h) {
  vf sum[4] = {};
  int64_t i = 0;
  for (; i + 4 * VW <= h; i += 4 * VW)
    for (int k = 0; k < 4; ++k) {
      const vf v = load(x + i + k * VW);
      sum[k] += v * v;
    }
  sweep(h - i, [&](int64_t j, auto lanes) {
    const vf v = load(x + i + j, lanes);
    sum[0] += v * v;
  });
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

template <class T>
INLINE float norm_row(const T* x, const T* weight, T* y, int64_t h, double eps) {
  const float rstd = 1.f / std::sqrt(sum_of_squares(x, h) / float(h) + float(eps));
  sweep(h, [&](int64_t i, auto lanes) { store(y + i, load(x + i, lanes) * rstd * load(weight + i, lanes), lanes); });
  return rstd;
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  CHECK_CONTIGUOUS(x);
  const int64_t n = x.size(0), h = x.size(1);
  CHECK_PACKED(weight, x.scalar_type(), h);
  Tensor y = fresh(x, {n, h}, x.scalar_type()), rstd = fresh(x, {n}, ScalarType::Float);
  BY_DTYPE(x, T, [&] {
    const T *from = in<T>(x), *w = in<T>(weight);
    T* to = out<T>(y);
    float* r = out<float>(rstd);
    parallel(n, h, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) r[i] = norm_row(from + i * h, w, to + i * h, h, eps);
    });
  });
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  CHECK_CONTIGUOUS(x);
  const int64_t n = x.size(0), h = x.size(1);
  CHECK_PACKED(residual, x.scalar_type(), n, h);
  CHECK_PACKED(weight, x.scalar_type(), h);
  Tensor y = fresh(x, {n, h}, x.scalar_type()), total = fresh(x, {n, h}, x.scalar_type());
  Tensor rstd = fresh(x, {n}, ScalarType::Float);
  BY_DTYPE(x, T, [&] {
    const T *a = in<T>(x), *b = in<T>(residual), *w = in<T>(weight);
    T *sum = out<T>(total), *to = out<T>(y);
    float* r = out<float>(rstd);
    parallel(n, 2 * h, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        sweep(h, [&](int64_t j, auto lanes) {
          store(sum + i * h + j, load(a + i * h + j, lanes) + load(b + i * h + j, lanes), lanes);
        });
        r[i] = norm_row(sum + i * h, w, to + i * h, h, eps);
      }
    });
  });
  return {y, total, rstd};
}

// d x (plus grad_total, the gradient that reaches x by the residual path) and d weight.
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                             std::optional<Tensor> grad_total) {
  CHECK_CONTIGUOUS(x);
  const int64_t n = x.size(0), h = x.size(1), blocks = (n + block_rows - 1) / block_rows;
  CHECK_PACKED(grad, x.scalar_type(), n, h);
  CHECK_PACKED(weight, x.scalar_type(), h);
  CHECK_PACKED(rstd, ScalarType::Float, n);
  CHECK_PACKED(grad_total, x.scalar_type(), n, h);
  Tensor grad_x = fresh(x, {n, h}, x.scalar_type()), grad_weight = fresh(x, {h}, x.scalar_type());
  Tensor partial = fresh(x, {blocks, h}, ScalarType::Float);
  float* sums = out<float>(partial);
  BY_DTYPE(x, T, [&] {
    const T *g = in<T>(grad), *from = in<T>(x), *w = in<T>(weight), *through = grad_total ? in<T>(*grad_total) : nullptr;
    const float* r = in<float>(rstd);
    T *gx = out<T>(grad_x), *gw = out<T>(grad_weight);
    parallel(blocks, block_rows * h * 3, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        float* sum = sums + block * h;
        std::fill(sum, sum + h, 0.f);
        for (int64_t i = block * block_rows; i < std::min(n, (block + 1) * block_rows); ++i) {
          const T *gi = g + i * h, *xi = from + i * h;
          vf dot = {};
          sweep(h, [&](int64_t j, auto lanes) { dot += load(gi + j, lanes) * load(w + j, lanes) * load(xi + j, lanes); });
          const float rs = r[i], c = hsum(dot) * rs * rs / float(h);
          sweep(h, [&](int64_t j, auto lanes) {
            const vf gj = load(gi + j, lanes), xj = load(xi + j, lanes);
            store(sum + j, load(sum + j, lanes) + gj * xj * rs, lanes);
            vf d = (gj * load(w + j, lanes) - xj * c) * rs;
            if (through) d += load(through + i * h + j, lanes);
            store(gx + i * h + j, d, lanes);
          });
        }
      }
    });
    sweep(h, [&](int64_t j, auto lanes) {
      vf total = {};
      for (int64_t block = 0; block < blocks; ++block) total += load(sums + block * h + j, lanes);
      store(gw + j, total, lanes);
    });
  });
  return {grad_x, grad_weight};
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", TORCH_BOX(&rms_norm));
  ops.add("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)", TORCH_BOX(&add_rms_norm));
  ops.add("rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd, Tensor? grad_total) -> (Tensor, Tensor)",
          TORCH_BOX(&rms_norm_backward));
}
