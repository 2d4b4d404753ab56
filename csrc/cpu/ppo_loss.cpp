// Policy loss, value loss and KL estimates with their gradients and statistics in one pass. Formulas: kernels/ppo_loss.py.
#include <limits>

#include "../op.h"

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr float log_ratio_max = 80.f;  // a ratio times its advantage stays finite

INLINE vf abs_of(vf x) { return x < 0.f ? -x : x; }

Tensor like(const Tensor& x) { return fresh(x, {x.numel()}, ScalarType::Float); }

void check(std::initializer_list<const Tensor*> tensors) {
  const int64_t n = (*tensors.begin())->numel();
  for (const Tensor* x : tensors) {
    CHECK_CONTIGUOUS(*x);
    STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && x->dim() == 1 && x->numel() == n, "trialign: all inputs are float32 [total]");
  }
}

// The pointers are parameters: from a lambda's captures they would be reloaded after every store.
void policy(const float* lp, const float* old, const float* advantage, float* loss, float* ratio, float* clip, float* gradient, int64_t n,
            float clip_low, float clip_high, std::optional<float> dual_clip) {
  const vf low = splat(clip_low), high = splat(clip_high), dual = splat(dual_clip.value_or(infinity)), zero = {};
  sweep(n, [&](int64_t i, auto lanes) {
    const vf d = load(lp + i, lanes) - load(old + i, lanes), a = load(advantage + i, lanes);
    const vf r = vexp(vmin(splat(log_ratio_max), vmax(splat(exp_low), d)));
    const vf kept = d == d ? r : d;
    const vf held = -a * vmin(high, vmax(low, kept)), free = -a * kept;
    vf value = free >= held ? free : held;
    vf slope = (free >= held) & (d <= log_ratio_max) ? free : zero;
    if (dual_clip) {
      const vf bound = -a * dual;
      const auto beyond = (a < 0.f) & (value > bound);
      value = beyond ? bound : value;
      slope = beyond ? zero : slope;
    }
    store(loss + i, value, lanes);
    store(ratio + i, kept, lanes);
    store(clip + i, held > free ? splat(1.f) : zero, lanes);
    store(gradient + i, slope, lanes);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> policy_loss(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, double clip_low,
                                                       double clip_high, std::optional<double> dual_clip) {
  check({&logp, &old_logp, &advantages});
  Tensor losses = like(logp), ratios = like(logp), clipped = like(logp), gradients = like(logp);
  const float *lp = in<float>(logp), *old = in<float>(old_logp), *advantage = in<float>(advantages);
  float *loss = out<float>(losses), *ratio = out<float>(ratios), *clip = out<float>(clipped), *gradient = out<float>(gradients);
  const float low = float(1 - clip_low), high = float(1 + clip_high);
  const std::optional<float> dual = dual_clip ? std::optional<float>(*dual_clip) : std::nullopt;
  parallel(logp.numel(), 8, [&](int64_t begin, int64_t end) {
    policy(lp + begin, old + begin, advantage + begin, loss + begin, ratio + begin, clip + begin, gradient + begin, end - begin, low, high, dual);
  });
  return {losses, ratios, clipped, gradients};
}

std::tuple<Tensor, Tensor, Tensor> value_loss(const Tensor& values, const Tensor& old_values, const Tensor& returns, std::optional<double> clip) {
  check({&values, &old_values, &returns});
  Tensor losses = like(values), clipped = like(values), gradients = like(values);
  const float *v = in<float>(values), *old = in<float>(old_values), *target = in<float>(returns);
  float *loss = out<float>(losses), *flag = out<float>(clipped), *gradient = out<float>(gradients);
  const float c = clip ? float(*clip) : infinity;
  parallel(values.numel(), 6, [&](int64_t begin, int64_t end) {
    sweep(end - begin, [&](int64_t j, auto lanes) {
      const int64_t i = begin + j;
      const vf o = load(old + i, lanes), r = load(target + i, lanes), x = load(v + i, lanes), zero = {};
      const vf step = x - o, near = clip ? o + vmin(splat(c), vmax(splat(-c), step)) : x;
      const vf free = x - r, held = near - r, free2 = free * free, held2 = held * held;
      store(loss + i, 0.5f * (free2 >= held2 ? free2 : held2), lanes);
      store(flag + i, (held2 > free2) & (abs_of(step) > c) ? splat(1.f) : zero, lanes);
      store(gradient + i, free2 >= held2 ? free : (abs_of(step) <= c ? held : zero), lanes);
    });
  });
  return {losses, clipped, gradients};
}

// k1, k2 and k3 by `kind` 1, 2, 3.
std::tuple<Tensor, Tensor> kl_estimate(const Tensor& logp, const Tensor& logp_ref, int64_t kind) {
  check({&logp, &logp_ref});
  STD_TORCH_CHECK(1 <= kind && kind <= 3, "trialign: KL estimator ", kind, ", allowed are 1 to 3");
  Tensor estimates = like(logp), gradients = like(logp);
  const float *lp = in<float>(logp), *ref = in<float>(logp_ref);
  float *estimate = out<float>(estimates), *gradient = out<float>(gradients);
  parallel(logp.numel(), 6, [&](int64_t begin, int64_t end) {
    sweep(end - begin, [&](int64_t j, auto lanes) {
      const int64_t i = begin + j;
      const vf d = load(lp + i, lanes) - load(ref + i, lanes);
      vf value = d, slope = splat(1.f);
      if (kind == 2) {
        value = 0.5f * d * d;
        slope = d;
      } else if (kind == 3) {
        const vf x = -d;
        vf e = vexp(vmin(splat(exp_high), vmax(splat(exp_low), x)));
        e = x > exp_high ? splat(infinity) : e;
        // Near 0 the direct form cancels: x^2 q(x) with the series of (e^x - 1 - x) / x^2.
        vf q = x * 2.48015873e-5f + 1.98412698e-4f;
        q = q * x + 1.38888889e-3f;
        q = q * x + 8.33333333e-3f;
        q = q * x + 4.16666667e-2f;
        q = q * x + 1.66666667e-1f;
        q = q * x + 0.5f;
        const auto small = abs_of(x) < 0.5f;
        value = small ? x * x * q : e - 1.f - x;
        slope = small ? -(x + x * x * q) : 1.f - e;
        value = d == d ? value : d;
      }
      store(estimate + i, value, lanes);
      store(gradient + i, slope, lanes);
    });
  });
  return {estimates, gradients};
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("policy_loss(Tensor logp, Tensor old_logp, Tensor advantages, float clip_low, float clip_high, float? dual_clip) -> (Tensor, Tensor, Tensor, Tensor)",
          TORCH_BOX(&policy_loss));
  ops.add("value_loss(Tensor values, Tensor old_values, Tensor returns, float? clip) -> (Tensor, Tensor, Tensor)", TORCH_BOX(&value_loss));
  ops.add("kl_estimate(Tensor logp, Tensor logp_ref, int kind) -> (Tensor, Tensor)", TORCH_BOX(&kl_estimate));
}
