// One pass of AdamW over flat fp32 buffers: clip scale, moments, decay, step and the cast to the compute dtype.
// Formulas: kernels/adamw.py.
#include "../common.cuh"

namespace {

constexpr int threads = 256;

struct Step {
  float beta1, beta2, decay, rate, correction, eps, grad_scale;  // decay = 1 - lr * weight_decay, rate = lr / (1 - beta1^t)
};

__device__ inline void advance(const Step& s, float& p, float& m, float& v, float g) {
  g *= s.grad_scale;
  m += (g - m) * (1.f - s.beta1);
  v = v * s.beta2 + g * g * (1.f - s.beta2);
  p = p * s.decay - s.rate * m / (sqrtf(v) * s.correction + s.eps);
}

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T item[4];
};

// Four elements a thread. `packs` of them lie where 16 bytes can be read at once; the rest goes one by one.
template <typename T, bool copy>
__global__ void __launch_bounds__(threads) adamw(Step s, float* master, float* exp_avg, float* exp_avg_sq, const float* grad, T* to, int64_t n, int64_t packs) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i < packs) {
    Pack<float> p = reinterpret_cast<Pack<float>*>(master)[i], m = reinterpret_cast<Pack<float>*>(exp_avg)[i];
    Pack<float> v = reinterpret_cast<Pack<float>*>(exp_avg_sq)[i];
    const Pack<float> g = reinterpret_cast<const Pack<float>*>(grad)[i];
    Four<T> cast;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      advance(s, p.item[k], m.item[k], v.item[k], g.item[k]);
      if (copy) put(&cast.item[k], p.item[k]);
    }
    reinterpret_cast<Pack<float>*>(master)[i] = p;
    reinterpret_cast<Pack<float>*>(exp_avg)[i] = m;
    reinterpret_cast<Pack<float>*>(exp_avg_sq)[i] = v;
    if (copy) reinterpret_cast<Four<T>*>(to)[i] = cast;
    return;
  }
  const int64_t begin = 4 * i, end = begin + 4 < n ? begin + 4 : n;
  for (int64_t j = begin; j < end; ++j) {
    advance(s, master[j], exp_avg[j], exp_avg_sq[j], grad[j]);
    if (copy) put(to + j, master[j]);
  }
}

}  // namespace

// to: null for no copy-out, else of the dtype by number.
extern "C" int launch_adamw(int dtype, float* master, float* exp_avg, float* exp_avg_sq, const float* grad, void* to, int64_t n, float beta1,
                            float beta2, float decay, float rate, float correction, float eps, float grad_scale, cudaStream_t stream) {
  const Step s{beta1, beta2, decay, rate, correction, eps, grad_scale};
  const bool wide = packable(master) && packable(exp_avg) && packable(exp_avg_sq) && packable(grad) && packable(to);
  const int64_t packs = wide ? n / 4 : 0;
  const dim3 grid(unsigned((n + 4 * threads - 1) / (4 * threads)));
  BY_NUMBER(dtype, T, [&] {
    T* copied = static_cast<T*>(to);
    if (to)
      LAUNCH((adamw<T, true>), grid, dim3(threads), 0, stream, s, master, exp_avg, exp_avg_sq, grad, copied, n, packs);
    else
      LAUNCH((adamw<T, false>), grid, dim3(threads), 0, stream, s, master, exp_avg, exp_avg_sq, grad, copied, n, packs);
  });
  return LAUNCH_STATUS();
}
