// Mixture of experts, without the experts' matmuls: top-k routing, the stable sort of slots by expert, the gather into
// expert order and the weighted sum back. Formulas: kernels/moe.py. No two threads write to one address, so results are reproducible.
#include <algorithm>
#include <limits>
#include <vector>

#include "../op.h"
#include "softmax.h"

namespace {

struct Choice {
  float z;
  int64_t expert;
};

// Largest first, ties by index; NaN before everything, as torch sorts.
INLINE bool ahead(float a, float b) { return a > b || (a != a && b == b); }

template <typename T>
void choose(const T* logits, int64_t experts, int64_t k, Choice* best) {
  int64_t found = 0;
  for (int64_t e = 0; e < experts; ++e) {
    const float z = get(logits + e);
    if (found == k && !ahead(z, best[k - 1].z)) continue;
    int64_t place = found < k ? found++ : k - 1;
    for (; place > 0 && ahead(z, best[place - 1].z); --place) best[place] = best[place - 1];
    best[place] = {z, e};
  }
}

// The sum of e^(z - peak) over a row.
template <typename T>
float mass(const T* logits, int64_t experts, float peak) {
  vf sum{};
  sweep(experts, [&](int64_t e, auto part) { sum += keep(weight(load(logits + e, part) - peak), 0.f, part); });
  return hsum(sum);
}

std::tuple<Tensor, Tensor> route(const Tensor& logits, int64_t k, bool normalize) {
  CHECK_CONTIGUOUS(logits);
  const int64_t n = logits.size(0), experts = logits.size(1);
  STD_TORCH_CHECK(1 <= k && k <= experts, "trialign: top-", k, " of ", experts, " experts");
  Tensor weights = fresh(logits, {n, k}, ScalarType::Float), chosen = fresh(logits, {n, k}, ScalarType::Long);
  BY_DTYPE(logits, T, [&] {
    const T* z = in<T>(logits);
    float* w = out<float>(weights);
    int64_t* c = out<int64_t>(chosen);
    parallel(n, 4 * experts, [&](int64_t begin, int64_t end) {
      std::vector<Choice> best(k);
      for (int64_t i = begin; i < end; ++i) {
        choose(z + i * experts, experts, k, best.data());
        const float peak = best[0].z;
        float total = 0;
        for (int64_t j = 0; j < k; ++j) {
          c[i * k + j] = best[j].expert;
          w[i * k + j] = std::exp(best[j].z - peak);
          total += w[i * k + j];
        }
        if (!normalize) total = mass(z + i * experts, experts, peak);
        for (int64_t j = 0; j < k; ++j) w[i * k + j] /= total;
      }
    });
  });
  return {weights, chosen};
}

void check_expert(int64_t expert, int64_t experts) {
  STD_TORCH_CHECK(0 <= expert && expert < experts, "trialign: expert ", expert, ", allowed are 0 to ", experts - 1);
}

// Normalized: dz_j = w_j (g_j - s), with s = sum_j g_j w_j, on the chosen alone. Else dz_e = p_e ([e chosen] g_e - s).
Tensor route_backward(const Tensor& grad, const Tensor& logits, const Tensor& weights, const Tensor& chosen, bool normalize) {
  CHECK_CONTIGUOUS(logits);
  const int64_t n = logits.size(0), experts = logits.size(1), k = weights.size(1);
  STD_TORCH_CHECK(1 <= k && k <= experts, "trialign: top-", k, " of ", experts, " experts");
  CHECK_PACKED(grad, ScalarType::Float, n, k);
  CHECK_PACKED(weights, ScalarType::Float, n, k);
  CHECK_PACKED(chosen, ScalarType::Long, n, k);
  for (int64_t s = 0; s < n * k; ++s) check_expert(in<int64_t>(chosen)[s], experts);
  Tensor result = fresh(logits, {n, experts}, logits.scalar_type());
  BY_DTYPE(logits, T, [&] {
    const T* z = in<T>(logits);
    const float *g = in<float>(grad), *w = in<float>(weights);
    const int64_t* c = in<int64_t>(chosen);
    T* d = out<T>(result);
    parallel(n, 2 * experts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = z + i * experts;
        T* to = d + i * experts;
        float s = 0;
        for (int64_t j = i * k; j < (i + 1) * k; ++j) s += g[j] * w[j];
        if (normalize) {
          std::fill(to, to + experts, T{});
        } else {  // p_e from a chosen one: w_0 = e^(z_0 - peak) / mass with z_0 the peak
          const float peak = get(row + c[i * k]), scale = -s * w[i * k];
          sweep(experts, [&](int64_t e, auto part) { store(to + e, weight(load(row + e, part) - peak) * scale, part); });
        }
        for (int64_t j = i * k; j < (i + 1) * k; ++j) put(to + c[j], w[j] * (g[j] - s));
      }
    });
  });
  return result;
}

std::tuple<Tensor, Tensor> sort_by_expert(const Tensor& experts, int64_t num_experts) {
  CHECK_CONTIGUOUS(experts);
  STD_TORCH_CHECK(experts.scalar_type() == ScalarType::Long, "trialign: experts must be int64");
  const int64_t slots = experts.numel();
  Tensor order = fresh(experts, {slots}, ScalarType::Long), offsets = fresh(experts, {num_experts + 1}, ScalarType::Long);
  const int64_t* expert = in<int64_t>(experts);
  int64_t *to = out<int64_t>(order), *start = out<int64_t>(offsets);
  std::fill(start, start + num_experts + 1, 0);
  for (int64_t s = 0; s < slots; ++s) {
    check_expert(expert[s], num_experts);
    ++start[expert[s] + 1];
  }
  for (int64_t e = 0; e < num_experts; ++e) start[e + 1] += start[e];
  std::vector<int64_t> next(start, start + num_experts);
  for (int64_t s = 0; s < slots; ++s) to[next[expert[s]]++] = s;
  return {order, offsets};
}

void check_slot(int64_t slot, int64_t slots) {
  STD_TORCH_CHECK(0 <= slot && slot < slots, "trialign: slot ", slot, " in order, allowed are 0 to ", slots - 1);
}

// The row of each slot: the inverse of `order`.
std::vector<int64_t> positions(const Tensor& order) {
  const int64_t slots = order.numel(), *slot = in<int64_t>(order);
  std::vector<int64_t> row(slots, -1);
  for (int64_t r = 0; r < slots; ++r) {
    check_slot(slot[r], slots);
    STD_TORCH_CHECK(row[slot[r]] < 0, "trialign: slot ", slot[r], " appears twice in order");
    row[slot[r]] = r;
  }
  return row;
}

Tensor permute(const Tensor& x, const Tensor& order, int64_t k) {
  CHECK_CONTIGUOUS(x);
  CHECK_PACKED(order, ScalarType::Long, order.numel());
  const int64_t slots = order.numel(), h = x.size(1);
  STD_TORCH_CHECK(k > 0 && slots == x.size(0) * k, "trialign: order has ", slots, " slots, allowed are ", x.size(0), " * ", k);
  Tensor rows = fresh(x, {slots, h}, x.scalar_type());
  const int64_t bytes = h * x.element_size(), *slot = in<int64_t>(order);
  const char* from = in<char>(x);
  char* to = out<char>(rows);
  parallel(slots, h, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      check_slot(slot[r], slots);
      memcpy(to + r * bytes, from + slot[r] / k * bytes, bytes);
    }
  });
  return rows;
}

// y[t] = sum_j w[t, j] rows[position(t, j)]; without weights each counts 1, which is the gradient of permute.
Tensor unpermute(const Tensor& rows, const Tensor& order, const std::optional<Tensor>& weights, int64_t k) {
  CHECK_CONTIGUOUS(rows);
  CHECK_PACKED(order, ScalarType::Long, order.numel());
  const int64_t slots = order.numel(), h = rows.size(1);
  STD_TORCH_CHECK(k > 0 && slots % k == 0 && rows.size(0) == slots, "trialign: ", rows.size(0), " rows and ", slots, " slots do not fit k = ", k);
  if (weights) {
    CHECK_CONTIGUOUS(*weights);
    STD_TORCH_CHECK(weights->scalar_type() == ScalarType::Float && weights->numel() == slots, "trialign: weights must be float32, one a slot");
  }
  const std::vector<int64_t> position = positions(order);
  Tensor y = fresh(rows, {slots / k, h}, rows.scalar_type());
  const float* w = weights ? in<float>(*weights) : nullptr;
  BY_DTYPE(rows, T, [&] {
    const T* from = in<T>(rows);
    T* to = out<T>(y);
    parallel(slots / k, h * (k + 1), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        sweep(h, [&](int64_t i, auto part) {
          vf sum{};
          for (int64_t s = t * k; s < (t + 1) * k; ++s) sum += load(from + position[s] * h + i, part) * (w ? w[s] : 1.f);
          store(to + t * h + i, sum, part);
        });
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> unpermute_backward(const Tensor& grad, const Tensor& rows, const Tensor& order, const Tensor& weights) {
  const int64_t n = weights.size(0), k = weights.size(1), h = rows.size(1);
  CHECK_PACKED(grad, rows.scalar_type(), n, h);
  CHECK_PACKED(rows, rows.scalar_type(), n * k, h);
  CHECK_PACKED(order, ScalarType::Long, n * k);
  CHECK_PACKED(weights, ScalarType::Float, n, k);
  const std::vector<int64_t> position = positions(order);
  Tensor grad_rows = fresh(rows, {n * k, h}, rows.scalar_type()), grad_weights = fresh(rows, {n, k}, ScalarType::Float);
  const float* w = in<float>(weights);
  float* dw = out<float>(grad_weights);
  BY_DTYPE(rows, T, [&] {
    const T *g = in<T>(grad), *from = in<T>(rows);
    T* to = out<T>(grad_rows);
    parallel(n, 3 * h * k, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin * k; s < end * k; ++s) {
        const T *upstream = g + s / k * h, *row = from + position[s] * h;
        T* there = to + position[s] * h;
        vf dot{};
        sweep(h, [&](int64_t i, auto part) {
          const vf u = load(upstream + i, part);
          dot += u * load(row + i, part);
          store(there + i, u * w[s], part);
        });
        dw[s] = hsum(dot);
      }
    });
  });
  return {grad_rows, grad_weights};
}

}  // namespace

TRIALIGN_OPS(ops) {
  ops.add("route(Tensor logits, int k, bool normalize) -> (Tensor, Tensor)", TORCH_BOX(&route));
  ops.add("route_backward(Tensor grad, Tensor logits, Tensor weights, Tensor experts, bool normalize) -> Tensor", TORCH_BOX(&route_backward));
  ops.add("sort_by_expert(Tensor experts, int num_experts) -> (Tensor, Tensor)", TORCH_BOX(&sort_by_expert));
  ops.add("permute(Tensor x, Tensor order, int k) -> Tensor", TORCH_BOX(&permute));
  ops.add("unpermute(Tensor rows, Tensor order, Tensor? weights, int k) -> Tensor", TORCH_BOX(&unpermute));
  ops.add("unpermute_backward(Tensor grad, Tensor rows, Tensor order, Tensor weights) -> (Tensor, Tensor)", TORCH_BOX(&unpermute_backward));
}
