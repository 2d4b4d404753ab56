// GAE over packed sequences: one reverse scan per sequence, masked tokens skipped. See kernels/gae.py.
#include <array>

#include "../op.h"

namespace {

struct Scan {
  const float *reward, *value;
  const bool* kept;
  float *advantage, *ret;
  float gamma, slope;  // slope = gamma * lambda
  vf powers[4];        // slope^1, 2, 4, 8
  vf reach;            // lane i: slope^(VW - i), weight of the first advantage after the vector
  float next_value = 0, running = 0;

  void skip(int64_t t, int64_t n) const {
    std::fill_n(advantage + t, n, 0.f);
    std::fill_n(ret + t, n, 0.f);
  }

  void one(int64_t t) {
    if (!kept[t]) return skip(t, 1);
    running = (reward[t] + gamma * next_value - value[t]) + slope * running;
    next_value = value[t];
    advantage[t] = running;
    ret[t] = running + next_value;
  }

  // VW kept tokens at once: a serial dependence between vectors only, not between tokens.
  void vector(int64_t t) {
    const vf v = load(value + t);
    vf behind = shift<1>(v);
    behind[VW - 1] = next_value;
    vf a = load(reward + t) + gamma * behind - v;
    a += powers[0] * shift<1>(a);
    a += powers[1] * shift<2>(a);
    if constexpr (VW > 4) a += powers[2] * shift<4>(a);
    if constexpr (VW > 8) a += powers[3] * shift<8>(a);
    a += reach * running;
    store(advantage + t, a);
    store(ret + t, a + v);
    next_value = v[0];
    running = a[0];
  }

  void sequence(int64_t start, int64_t end) {
    static constexpr auto all = [] {
      std::array<bool, VW> lanes{};
      lanes.fill(true);
      return lanes;
    }();
    static constexpr std::array<bool, VW> none{};
    next_value = running = 0;
    int64_t t = end;
    while (t - VW >= start) {
      t -= VW;
      if (!std::memcmp(kept + t, all.data(), VW)) {
        vector(t);
      } else if (!std::memcmp(kept + t, none.data(), VW)) {
        skip(t, VW);
      } else {
        for (int64_t i = t + VW - 1; i >= t; --i) one(i);
      }
    }
    while (t > start) one(--t);
  }
};

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens,
                               double gamma, double lam) {
  const int64_t total = rewards.numel(), sequences = cu_seqlens.numel() - 1;
  const int64_t* starts = starts_of(cu_seqlens, total, total);
  CHECK_PACKED(rewards, ScalarType::Float, total);
  CHECK_PACKED(values, ScalarType::Float, total);
  CHECK_PACKED(mask, ScalarType::Bool, total);
  Tensor advantages = fresh(rewards, {total}, ScalarType::Float), returns = fresh(rewards, {total}, ScalarType::Float);
  Scan scan{rewards.const_data_ptr<float>(), values.const_data_ptr<float>(), mask.const_data_ptr<bool>(),
            advantages.mutable_data_ptr<float>(), returns.mutable_data_ptr<float>(), float(gamma), float(gamma * lam)};
  double power = 1;
  for (int lane = VW - 1; lane >= 0; --lane) scan.reach[lane] = float(power *= gamma * lam);
  for (int i = 0; i < 4; ++i) scan.powers[i] = splat(float(std::pow(gamma * lam, 1 << i)));
  parallel(sequences, sequences > 0 ? total / sequences : 1, [&](int64_t begin, int64_t end) {
    Scan mine = scan;
    for (int64_t s = begin; s < end; ++s) mine.sequence(starts[s], starts[s + 1]);
  });
  return {advantages, returns};
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("gae(Tensor rewards, Tensor values, Tensor mask, Tensor cu_seqlens, float gamma, float lam) -> (Tensor, Tensor)", TORCH_BOX(&gae));
}
