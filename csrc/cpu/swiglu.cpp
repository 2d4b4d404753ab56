// SwiGLU over gate and up side by side, forward and backward. Formulas: kernels/swiglu.py.
#include "../op.h"

namespace {

INLINE vf sigmoid(vf x) { return 1.f / (1.f + vexp(vmin(splat(exp_high), vmax(splat(exp_low), -x)))); }

Tensor swiglu(const Tensor& gate_up) {
  CHECK_CONTIGUOUS(gate_up);
  const int64_t n = gate_up.size(0), f = gate_up.size(1) / 2;
  CHECK_SIZES(gate_up, n, 2 * f);
  Tensor y = fresh(gate_up, {n, f}, gate_up.scalar_type());
  BY_DTYPE(gate_up, T, [&] {
    const T* from = in<T>(gate_up);
    T* to = out<T>(y);
    parallel(n, 4 * f, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* gate = from + i * 2 * f;
        sweep(f, [&](int64_t j, auto lanes) {
          const vf a = load(gate + j, lanes);
          store(to + i * f + j, a * sigmoid(a) * load(gate + f + j, lanes), lanes);
        });
      }
    });
  });
  return y;
}

Tensor swiglu_backward(const Tensor& grad, const Tensor& gate_up) {
  CHECK_CONTIGUOUS(gate_up);
  const int64_t n = gate_up.size(0), f = gate_up.size(1) / 2;
  CHECK_SIZES(gate_up, n, 2 * f);
  CHECK_PACKED(grad, gate_up.scalar_type(), n, f);
  Tensor result = fresh(gate_up, {n, 2 * f}, gate_up.scalar_type());
  BY_DTYPE(gate_up, T, [&] {
    const T *g = in<T>(grad), *from = in<T>(gate_up);
    T* to = out<T>(result);
    parallel(n, 6 * f, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* gate = from + i * 2 * f;
        T* d = to + i * 2 * f;
        sweep(f, [&](int64_t j, auto lanes) {
          const vf a = load(gate + j, lanes), b = load(gate + f + j, lanes), gj = load(g + i * f + j, lanes), s = sigmoid(a);
          store(d + j, gj * b * s * (1.f + a * (1.f - s)), lanes);
          store(d + f + j, gj * a * s, lanes);
        });
      }
    });
  });
  return result;
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("swiglu(Tensor gate_up) -> Tensor", TORCH_BOX(&swiglu));
  ops.add("swiglu_backward(Tensor grad, Tensor gate_up) -> Tensor", TORCH_BOX(&swiglu_backward));
}
