// One pass of AdamW over flat fp32 buffers: clip scale, moments, decay, step and the cast to the compute dtype.
// See kernels/adamw.py. torch's fused step needs two passes more for the same work (scale the gradient, copy out).
#include <algorithm>

#include "../op.h"
#include "../simd.h"

namespace {

struct Step {
  float beta1, beta2, decay, rate, correction, eps, grad_scale;   // decay = 1 - lr * weight_decay, rate = lr / (1 - beta1^t)
};

INLINE vf root(vf x) {
  for (int i = 0; i < VW; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

INLINE vf stepped(const Step& s, vf p, vf g, vf& m, vf& v) {
  g *= s.grad_scale;
  m += (g - m) * (1.f - s.beta1);
  v = v * s.beta2 + g * g * (1.f - s.beta2);
  return p * s.decay - s.rate * m / (root(v) * s.correction + s.eps);
}

template <typename T>
__attribute__((noinline)) void range(const Step& s, int64_t begin, int64_t end, float* p, float* m, float* v, const float* g, T* out) {
  int64_t i = begin;
  for (; i + VW <= end; i += VW) {
    vf mean = load(m + i), square = load(v + i);
    const vf next = stepped(s, load(p + i), load(g + i), mean, square);
    store(p + i, next);
    store(m + i, mean);
    store(v + i, square);
    if (out) store(out + i, next);
  }
  if (i == end) return;
  // The rest goes through the same instructions: a result must not depend on how the buffer is split.
  float part[4][VW] = {};
  T part_out[VW];
  float* buffers[3] = {p + i, m + i, v + i};
  for (int b = 0; b < 3; ++b) std::copy(buffers[b], buffers[b] + (end - i), part[b]);
  std::copy(g + i, g + end, part[3]);
  range(s, 0, VW, part[0], part[1], part[2], part[3], out ? part_out : nullptr);
  for (int b = 0; b < 3; ++b) std::copy(part[b], part[b] + (end - i), buffers[b]);
  if (out) std::copy(part_out, part_out + (end - i), out + i);
}

void adamw(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, const Tensor& grad, const std::optional<Tensor>& param_out, double lr, double beta1,
           double beta2, double eps, double weight_decay, int64_t step, double grad_scale) {
  const int64_t n = master.numel();
  for (const Tensor* buffer : std::initializer_list<const Tensor*>{&master, &exp_avg, &exp_avg_sq, &grad})
    STD_TORCH_CHECK(buffer->is_contiguous() && buffer->numel() == n && buffer->scalar_type() == ScalarType::Float,
                    "trialign: adamw takes contiguous float32 buffers of one size, got ", buffer->numel(), " elements beside ", n);
  STD_TORCH_CHECK(!param_out || (param_out->is_contiguous() && param_out->numel() == n &&
                                 (param_out->scalar_type() == ScalarType::Float || param_out->scalar_type() == ScalarType::BFloat16)),
                  "trialign: param_out must be contiguous, float32 or bfloat16, of ", n, " elements");
  const Step s{float(beta1), float(beta2), float(1 - lr * weight_decay), float(lr / (1 - std::pow(beta1, double(step)))),
               float(1 / std::sqrt(1 - std::pow(beta2, double(step)))), float(eps), float(grad_scale)};
  float *p = master.mutable_data_ptr<float>(), *m = exp_avg.mutable_data_ptr<float>(), *v = exp_avg_sq.mutable_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  const bool narrow = param_out && param_out->scalar_type() == ScalarType::BFloat16;
  void* out = param_out ? param_out->mutable_data_ptr() : nullptr;
  parallel(n, 1, [&](int64_t begin, int64_t end) {
    if (narrow)
      range(s, begin, end, p, m, v, g, static_cast<bf16*>(out));
    else
      range(s, begin, end, p, m, v, g, static_cast<float*>(out));
  });
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("adamw(Tensor(a!) master, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor(d!)? param_out, float lr, float beta1, float beta2, "
          "float eps, float weight_decay, int step, float grad_scale) -> ()",
          TORCH_BOX(&adamw));
}
