// Online softmax statistics (m, s, t, y) of logits, and the gradient from them. Formulas: kernels/logprob.py.
#include <limits>

#include "../op.h"

namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr int64_t block = 2048;  // columns read twice (maximum, then sums): they stay in the first cache

struct Stats {
  float m, s, t;
};

// Stats of two disjoint parts of a row together.
INLINE Stats join(Stats a, Stats b) {
  if (a.s == 0) return b;
  if (b.s == 0) return a;
  const float m = a.m > b.m ? a.m : b.m, da = a.m - m, db = b.m - m, fa = std::exp(da), fb = std::exp(db);
  return {m, a.s * fa + b.s * fb, a.t * fa + a.s * (da * fa) + b.t * fb + b.s * (db * fb)};
}

// Adds e^d and e^d d of one vector, d = (x - base) * scale: in this order it is exactly 0 at the maximum.
INLINE void add(vf x, float scale, float base, vf& s, vf& t) {
  // -inf becomes a probability of 1e-38. The block's maximum ignores a NaN; here it reaches t.
  const vf d = vmax(splat(exp_low), (x - base) * scale), p = vexp(d);
  s += p;
  t += p * d;
}

template <class T>
INLINE Stats block_stats(const T* x, int64_t n, float scale) {
  vf top[2] = {splat(-infinity), splat(-infinity)}, s[2] = {}, t[2] = {};
  const int64_t whole = n / (2 * VW) * (2 * VW);
  for (int64_t j = 0; j < whole; j += 2 * VW) {
    vf a, b;
    load_two(x + j, a, b);
    top[0] = vmax(a, top[0]);
    top[1] = vmax(b, top[1]);
  }
  sweep(n - whole, [&](int64_t j, auto lanes) { top[0] = vmax(keep(load(x + whole + j, lanes), -infinity, lanes), top[0]); });
  const float raw = hmax(vmax(top[0], top[1])), m = raw * scale, base = raw == -infinity ? 0.f : raw;
  for (int64_t j = 0; j < whole; j += 2 * VW) {
    vf a, b;
    load_two(x + j, a, b);
    add(a, scale, base, s[0], t[0]);
    add(b, scale, base, s[1], t[1]);
  }
  sweep(n - whole, [&](int64_t j, auto lanes) {
    add(keep(load(x + whole + j, lanes), -infinity, lanes), scale, base, s[0], t[0]);
  });
  const float total = hsum(t[0] + t[1]);
  if (total != total) return {m, total, total};
  return m == -infinity ? Stats{m, 0, 0} : Stats{m, hsum(s[0] + s[1]), total};
}

void logprob_update_(const Tensor& stats, const Tensor& logits, const Tensor& labels, double scale, int64_t vocab_start) {
  const int64_t n = logits.size(0), v = logits.size(1), row = logits.stride(0);
  CHECK_PACKED(stats, ScalarType::Float, 4, n);
  CHECK_PACKED(labels, ScalarType::Long, n);
  STD_TORCH_CHECK(v == 0 || logits.stride(1) == 1, "trialign: logits rows must be contiguous");
  STD_TORCH_CHECK(scale > 0, "trialign: scale must be positive");
  float* state = out<float>(stats);
  const int64_t* label = in<int64_t>(labels);
  BY_DTYPE(logits, T, [&] {
    const T* x = in<T>(logits);
    parallel(n, 4 * v, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Stats all{state[i], state[n + i], state[2 * n + i]};
        const T* xi = x + i * row;
        for (int64_t j = 0; j < v; j += block) all = join(all, block_stats(xi + j, std::min(block, v - j), float(scale)));
        state[i] = all.m;
        state[n + i] = all.s;
        state[2 * n + i] = all.t;
        const int64_t local = label[i] - vocab_start;
        if (local >= 0 && local < v) state[3 * n + i] += get(xi + local) * float(scale);
      }
    });
  });
}

Tensor logprob_stats(const Tensor& logits, const Tensor& labels, double scale, int64_t vocab_start) {
  const int64_t n = logits.size(0);
  Tensor stats = fresh(logits, {4, n}, ScalarType::Float);
  float* state = out<float>(stats);
  std::fill(state, state + n, -infinity);
  std::fill(state + n, state + 4 * n, 0.f);
  logprob_update_(stats, logits, labels, scale, vocab_start);
  return stats;
}

// to may be from: each element is read before it is written, the label's too.
template <class T>
void gradient(const T* from, T* to, int64_t n, int64_t v, int64_t row, const int64_t* label, const float* stats, const float* grad_logprob,
              const float* grad_entropy, float scale, int64_t vocab_start) {
  parallel(n, 3 * v, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float m = stats[i], s = stats[n + i], t = stats[2 * n + i], log_s = std::log(s), entropy = log_s - t / s;
      const float g = grad_logprob ? grad_logprob[i] : 0.f, ge = grad_entropy ? grad_entropy[i] : 0.f;
      const float constant = -(g + ge * entropy) * scale, slope = -ge * scale;
      const T* x = from + i * row;
      T* y = to + i * v;
      const int64_t local = label[i] - vocab_start;
      float at_label = 0;
      if (local >= 0 && local < v) {
        const float d = std::max(get(x + local) * scale - m - log_s, -1e30f);  // a label at -inf has p = 0, not NaN
        at_label = g * scale + std::exp(d) * (constant + slope * d);
      }
      sweep(v, [&](int64_t j, auto lanes) {
        const vf d = vmax(splat(exp_low), load(x + j, lanes) * scale - m - log_s);
        store(y + j, vexp(d) * (constant + slope * d), lanes);
      });
      if (local >= 0 && local < v) put(y + local, at_label);
    }
  });
}

void check_gradient(const Tensor& logits, const Tensor& labels, const Tensor& stats, const std::optional<Tensor>& grad_logprob,
                    const std::optional<Tensor>& grad_entropy) {
  const int64_t n = logits.size(0);
  CHECK_PACKED(stats, ScalarType::Float, 4, n);
  CHECK_PACKED(labels, ScalarType::Long, n);
  CHECK_PACKED(grad_logprob, ScalarType::Float, n);
  CHECK_PACKED(grad_entropy, ScalarType::Float, n);
  STD_TORCH_CHECK(logits.size(1) == 0 || logits.stride(1) == 1, "trialign: logits rows must be contiguous");
}

Tensor logprob_backward(const Tensor& logits, const Tensor& labels, const Tensor& stats, std::optional<Tensor> grad_logprob,
                        std::optional<Tensor> grad_entropy, double scale, int64_t vocab_start) {
  check_gradient(logits, labels, stats, grad_logprob, grad_entropy);
  const int64_t n = logits.size(0), v = logits.size(1);
  Tensor result = fresh(logits, {n, v}, logits.scalar_type());
  BY_DTYPE(logits, T, [&] {
    gradient(in<T>(logits), out<T>(result), n, v, logits.stride(0), in<int64_t>(labels), in<float>(stats),
             grad_logprob ? in<float>(*grad_logprob) : nullptr, grad_entropy ? in<float>(*grad_entropy) : nullptr, float(scale), vocab_start);
  });
  return result;
}

void logprob_backward_(const Tensor& logits, const Tensor& labels, const Tensor& stats, std::optional<Tensor> grad_logprob,
                       std::optional<Tensor> grad_entropy, double scale, int64_t vocab_start) {
  check_gradient(logits, labels, stats, grad_logprob, grad_entropy);
  CHECK_CONTIGUOUS(logits);
  const int64_t n = logits.size(0), v = logits.size(1);
  BY_DTYPE(logits, T, [&] {
    gradient(in<T>(logits), out<T>(logits), n, v, v, in<int64_t>(labels), in<float>(stats), grad_logprob ? in<float>(*grad_logprob) : nullptr,
             grad_entropy ? in<float>(*grad_entropy) : nullptr, float(scale), vocab_start);
  });
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("logprob_stats(Tensor logits, Tensor labels, float scale, int vocab_start) -> Tensor", TORCH_BOX(&logprob_stats));
  ops.add("logprob_update_(Tensor(a!) stats, Tensor logits, Tensor labels, float scale, int vocab_start) -> ()", TORCH_BOX(&logprob_update_));
  ops.add("logprob_backward(Tensor logits, Tensor labels, Tensor stats, Tensor? grad_logprob, Tensor? grad_entropy, float scale, int vocab_start) -> Tensor",
          TORCH_BOX(&logprob_backward));
  ops.add("logprob_backward_(Tensor(a!) logits, Tensor labels, Tensor stats, Tensor? grad_logprob, Tensor? grad_entropy, float scale, int vocab_start) -> ()",
          TORCH_BOX(&logprob_backward_));
}
