// GAE over packed sequences: one reverse scan per sequence, masked tokens skipped. See kernels/gae.py.
#include "../op.h"

namespace {

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens,
                               double gamma, double lam) {
  const int64_t total = rewards.numel(), sequences = cu_seqlens.numel() - 1;
  Tensor advantages = fresh(rewards, {total}, ScalarType::Float), returns = fresh(rewards, {total}, ScalarType::Float);
  const float* reward = rewards.const_data_ptr<float>();
  const float* value = values.const_data_ptr<float>();
  const bool* kept = mask.const_data_ptr<bool>();
  const int64_t* starts = cu_seqlens.const_data_ptr<int64_t>();
  float* advantage = advantages.mutable_data_ptr<float>();
  float* ret = returns.mutable_data_ptr<float>();
  parallel(sequences, sequences > 0 ? total / sequences : 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      double next_value = 0, running = 0;  // double costs nothing here: the loop waits on its own chain
      for (int64_t t = starts[s + 1] - 1; t >= starts[s]; --t) {
        if (!kept[t]) {
          advantage[t] = ret[t] = 0;
          continue;
        }
        running = (reward[t] + gamma * next_value - value[t]) + gamma * lam * running;
        next_value = value[t];
        advantage[t] = float(running);
        ret[t] = float(running + next_value);
      }
    }
  });
  return {advantages, returns};
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("gae(Tensor rewards, Tensor values, Tensor mask, Tensor cu_seqlens, float gamma, float lam) -> (Tensor, Tensor)", TORCH_BOX(&gae));
}
