// Rotary embedding in place, both layouts; `inverse` turns back, which is the gradient. Formula: kernels/rope.py.
#include "../op.h"

namespace {

void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool inverse) {
  const int64_t n = x.size(0), heads = x.size(1), d = x.size(2), half = d / 2;
  STD_TORCH_CHECK(d == 2 * half && x.stride(2) == 1, "trialign: rope needs an even head size and contiguous heads");
  CHECK_PACKED(cos, ScalarType::Float, n, half);
  CHECK_PACKED(sin, ScalarType::Float, n, half);
  const int64_t row = x.stride(0), head = x.stride(1);  // x may be a slice of a fused projection
  const float sign = inverse ? -1.f : 1.f;
  BY_DTYPE(x, T, [&] {
    T* data = out<T>(x);
    const float *cs = in<float>(cos), *sn = in<float>(sin);
    parallel(n, heads * d, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float *c = cs + i * half, *s = sn + i * half;
        for (int64_t k = 0; k < heads; ++k) {
          T* p = data + i * row + k * head;
          if (interleaved) {
            for (int64_t j = 0; j < half; ++j) {
              const float a = get(p + 2 * j), b = get(p + 2 * j + 1), sj = sign * s[j];
              put(p + 2 * j, a * c[j] - b * sj);
              put(p + 2 * j + 1, b * c[j] + a * sj);
            }
          } else {
            sweep(half, [&](int64_t j, auto lanes) {
              const vf a = load(p + j, lanes), b = load(p + half + j, lanes), cj = load(c + j, lanes), sj = load(s + j, lanes) * sign;
              store(p + j, a * cj - b * sj, lanes);
              store(p + half + j, b * cj + a * sj, lanes);
            });
          }
        }
      }
    });
  });
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> ()", TORCH_BOX(&rope_));
}
