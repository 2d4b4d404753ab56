// Draws tokens from logits: temperature, top-k, top-p. Definition: kernels/sampling.py.
//
// z = (logit - max) / temperature <= 0 and w = e^z are computed once per row. The cut of top-k and top-p is found with a
// histogram over z: only the bin in which the count or the mass is reached has to be sorted.
#include <algorithm>
#include <vector>

#include "../op.h"
#include "softmax.h"

namespace {

constexpr int64_t CHUNK = 256;          // weights summed in fp32 before they join a double
constexpr int64_t BINS = 2048;
constexpr float BINS_PER_UNIT = 32.f;   // bin of z is min(-32 z, 2047): the last one holds weights below e^-64

// Philox4x32-10 of the counter (low, high, 0, 0); 53 of its bits as a double in [0, 1).
double uniform(int64_t key, int64_t counter) {
  uint32_t k0 = uint32_t(key), k1 = uint32_t(uint64_t(key) >> 32);
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(uint64_t(counter) >> 32), c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53u) * c0, b = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t n0 = uint32_t(b >> 32) ^ c1 ^ k0, n2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = uint32_t(b), c2 = n2, c3 = uint32_t(a);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return double((uint64_t(c0 >> 5) << 26) + (c1 >> 6)) * 0x1p-53;
}

struct Candidate {
  float z;
  int32_t index;
};
bool ahead(const Candidate& a, const Candidate& b) { return a.z > b.z || (a.z == b.z && a.index < b.index); }

struct Workspace {
  std::vector<float> z, w;
  std::vector<int32_t> counts;
  std::vector<double> masses;
  std::vector<Candidate> bin;
};

int64_t bin_of(float z) { return int64_t(std::min(-z * BINS_PER_UNIT, float(BINS - 1))); }

// Members of one bin up to `cut`, best first.
void collect(Workspace& s, int64_t v, int64_t bin, const Candidate& cut) {
  s.bin.clear();
  for (int64_t i = 0; i < v; ++i) {
    const Candidate c{s.z[i], int32_t(i)};
    if (bin_of(c.z) == bin && !ahead(cut, c)) s.bin.push_back(c);
  }
  std::sort(s.bin.begin(), s.bin.end(), ahead);
}

// The last candidate that top-k and top-p keep.
Candidate find_cut(Workspace& s, int64_t v, int64_t k, double p) {
  s.counts.assign(BINS, 0);
  s.masses.assign(BINS, 0.);
  for (int64_t i = 0; i < v; ++i) {
    const int64_t bin = bin_of(s.z[i]);
    ++s.counts[bin];
    s.masses[bin] += s.w[i];
  }
  Candidate cut{-INFINITY, INT32_MAX};
  if (k > 0 && k < v) {
    int64_t bin = 0, left = k;
    while (left > s.counts[bin]) left -= s.counts[bin++];
    collect(s, v, bin, cut);
    cut = s.bin[left - 1];
    s.masses[bin] = 0;
    for (int64_t i = 0; i < left; ++i) s.masses[bin] += s.w[s.bin[i].index];
    std::fill(s.masses.begin() + bin + 1, s.masses.end(), 0.);
  }
  if (p < 1) {
    double total = 0, before = 0;
    for (double mass : s.masses) total += mass;
    int64_t bin = 0;
    while (bin + 1 < BINS && before + s.masses[bin] < p * total) before += s.masses[bin++];
    collect(s, v, bin, cut);
    // The first candidate before which p is already reached is out; the best of all always stays.
    for (size_t i = 0; i < s.bin.size(); ++i) {
      if (i > 0 && before >= p * total) break;
      before += s.w[s.bin[i].index];
      cut = s.bin[i];
    }
  }
  return cut;
}

template <typename T>
void draw(const T* logits, int64_t v, float temperature, int64_t k, double p, int64_t key, int64_t counter, Workspace& s, int64_t* token, float* logprob) {
  const int64_t whole = v / VW * VW;
  *token = -1;
  *logprob = NAN;
  vf top = splat(-INFINITY);
  for (int64_t i = 0; i < whole; i += VW) top = vmax(top, load(logits + i));
  float peak = hmax(top);
  for (int64_t i = whole; i < v; ++i) peak = std::max(peak, get(logits + i));
  if (!std::isfinite(peak) || !(temperature >= 0)) return;
  const bool greedy = temperature == 0;
  const float inverse = greedy ? 1.f : temperature;
  const bool cuts = !greedy && ((k > 0 && k < v) || p < 1);
  s.w.resize(v);
  if (cuts) s.z.resize(v);
  double total = 0;
  for (int64_t c = 0; c < v; c += CHUNK) {
    const int64_t stop = std::min(c + CHUNK, v);
    vf sum = splat(0.f);
    int64_t i = c;
    for (; i + VW <= stop; i += VW) {
      const vf z = (load(logits + i) - peak) / inverse;
      const vf w = weight(z);
      if (cuts) store(s.z.data() + i, z);
      store(s.w.data() + i, w);
      sum += w;
    }
    float rest = hsum(sum);
    for (; i < stop; ++i) {
      const float z = (get(logits + i) - peak) / inverse;
      if (cuts) s.z[i] = z;
      s.w[i] = z < exp_low ? 0.f : std::exp(z);
      rest += s.w[i];
    }
    total += rest;
  }
  if (!std::isfinite(total)) return;      // a NaN among the logits
  if (greedy) {
    int64_t best = 0;
    while (get(logits + best) != peak) ++best;
    *token = best;
    *logprob = float(-std::log(total));
    return;
  }
  if (cuts) {
    const Candidate cut = find_cut(s, v, k, p);
    total = 0;
    for (int64_t c = 0; c < v; c += CHUNK) {
      const int64_t stop = std::min(c + CHUNK, v);
      float sum = 0;
      for (int64_t i = c; i < stop; ++i) {
        const bool kept = s.z[i] > cut.z || (s.z[i] == cut.z && i <= cut.index);
        s.w[i] = kept ? s.w[i] : 0.f;
        sum += s.w[i];
      }
      total += sum;
    }
  }
  const double target = uniform(key, counter) * total;
  double cumulative = 0;
  int64_t drawn = -1;
  for (int64_t c = 0; c < v; c += CHUNK) {
    const int64_t stop = std::min(c + CHUNK, v);
    vf sum = splat(0.f);
    int64_t i = c;
    for (; i + VW <= stop; i += VW) sum += load(s.w.data() + i);
    float rest = hsum(sum);
    for (; i < stop; ++i) rest += s.w[i];
    if (cumulative + rest <= target) {
      cumulative += rest;
      continue;
    }
    double running = cumulative;
    for (i = c; i < stop; ++i) {
      if (s.w[i] == 0) continue;
      drawn = i;
      running += s.w[i];
      if (running > target) break;
    }
    break;
  }
  if (drawn < 0)                          // rounding brought the target to the total: the last token with weight
    for (drawn = v - 1; s.w[drawn] == 0;) --drawn;
  *token = drawn;
  *logprob = float((get(logits + drawn) - peak) / inverse - std::log(total));
}

std::tuple<Tensor, Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p, const Tensor& keys,
                                  const Tensor& counters) {
  const int64_t batch = logits.size(0), v = logits.size(1), stride = logits.stride(0);
  STD_TORCH_CHECK(logits.stride(1) == 1, "the logits of a row must be contiguous");
  CHECK_PACKED(temperature, ScalarType::Float, batch);
  CHECK_PACKED(top_k, ScalarType::Int, batch);
  CHECK_PACKED(top_p, ScalarType::Float, batch);
  CHECK_PACKED(keys, ScalarType::Long, batch);
  CHECK_PACKED(counters, ScalarType::Long, batch);
  Tensor tokens = fresh(logits, {batch}, ScalarType::Long), logprobs = fresh(logits, {batch}, ScalarType::Float);
  const float *t = temperature.const_data_ptr<float>(), *p = top_p.const_data_ptr<float>();
  const int32_t* k = top_k.const_data_ptr<int32_t>();
  const int64_t *key = keys.const_data_ptr<int64_t>(), *counter = counters.const_data_ptr<int64_t>();
  int64_t* token = tokens.mutable_data_ptr<int64_t>();
  float* logprob = logprobs.mutable_data_ptr<float>();
  BY_DTYPE(logits, T, [&] {
    const T* x = in<T>(logits);
    pieces(batch, 1, [&](int64_t begin, int64_t end) {
      Workspace scratch;
      for (int64_t b = begin; b < end; ++b) draw(x + b * stride, v, t[b], k[b], double(p[b]), key[b], counter[b], scratch, token + b, logprob + b);
    });
  });
  return {tokens, logprobs};
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor keys, Tensor counters) -> (Tensor, Tensor)", TORCH_BOX(&sample));
}
