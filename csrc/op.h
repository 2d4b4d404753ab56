// Registration, allocation and checks for the op files of trialign._C.
// To add an op: put csrc/cpu/<op>.cpp with its code in an anonymous namespace and `TRIALIGN_OPS(ops) { ops.add("<schema>", TORCH_BOX(&fn)); }`.
// The file is compiled once per SIMD level (simd.h has the level's vector width); only the level the machine runs registers its ops.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "checks.h"
#include "pool.h"
#include "simd.h"

namespace trialign {

// Collects ops of the namespace `trialign`: the schema and its CPU implementation.
class Ops {
 public:
  void add(const char* schema, void (*boxed)(StableIValue*, uint64_t, uint64_t));

 private:
  torch::stable::detail::StableLibrary schemas_{
      torch::stable::detail::StableLibrary::Kind::FRAGMENT, "trialign", nullptr, __FILE__, __LINE__};
  torch::stable::detail::StableLibrary cpu_{
      torch::stable::detail::StableLibrary::Kind::IMPL, "trialign", "CPU", __FILE__, __LINE__};
};

struct Registration {
  Registration(int level, void (*fill)(Ops&));
};

}  // namespace trialign

#define TRIALIGN_OPS(ops)                                                            \
  static void trialign_fill_ops(trialign::Ops& ops);                                 \
  static const trialign::Registration trialign_registration(TRIALIGN_LEVEL, &trialign_fill_ops); \
  static void trialign_fill_ops(trialign::Ops& ops)

// Anonymous: every SIMD level has its own copy of the rest.
namespace {

// A fresh uninitialized tensor on the device of `like`. Large ones request huge pages: faulting in 4 KB pages would cost
// as much as the arithmetic of an elementwise op.
[[maybe_unused]] Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor made = torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const size_t bytes = size_t(made.numel()) * made.element_size();
  if (bytes >= 4 * page) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(made.data_ptr()), first = (start + page - 1) / page * page;
    madvise(reinterpret_cast<void*>(first), (start + bytes) / page * page - first, MADV_HUGEPAGE);  // only a hint
  }
#endif
  return made;
}

// fn(begin, end) over [0, n) in pieces of at most `grain`, on the threads of pool.h: for ops of a decode step. As many as torch's.
template <class F>
void pieces(int64_t n, int64_t grain, const F& fn) {
  const auto call = [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); };
  trialign::run_pieces(n, grain, torch::stable::get_num_threads(), call, const_cast<F*>(&fn));
}

// fn(begin, end) over [0, n); `cost` is the work of one item in elements touched. Short jobs, as those of a decode step, run on the threads
// of pool.h, long ones on torch's own, which the matrix products around them use.
template <class F>
void parallel(int64_t n, int64_t cost, const F& fn) {
  constexpr int64_t worth_a_thread = 32768;
  const int64_t grain = std::max<int64_t>(1, worth_a_thread / std::max<int64_t>(1, cost));
  if (n <= 0) return;
  if (n * cost <= 8 * worth_a_thread) return pieces(n, std::max<int64_t>(1, grain / 2), fn);
  torch::stable::parallel_for(0, n, grain, fn);
}

// Runs the lambda with T = float or bf16 (simd.h).
#define BY_DTYPE(tensor, T, ...)                                                             \
  do {                                                                                       \
    const ScalarType dtype_ = (tensor).scalar_type();                                        \
    if (dtype_ == ScalarType::Float) {                                                       \
      using T = float;                                                                       \
      __VA_ARGS__();                                                                         \
    } else {                                                                                 \
      STD_TORCH_CHECK(dtype_ == ScalarType::BFloat16, "trialign: float32 or bfloat16 needed"); \
      using T = bf16;                                                                        \
      __VA_ARGS__();                                                                         \
    }                                                                                        \
  } while (0)

template <class T>
const T* in(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* out(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Starts of packed sequences: in order and within `total` tokens, so that nothing is read out of bounds.
inline const int64_t* starts_of(const Tensor& cu_seqlens, int64_t total, int64_t longest) {
  STD_TORCH_CHECK(cu_seqlens.scalar_type() == ScalarType::Long && cu_seqlens.is_contiguous() && cu_seqlens.numel() > 0,
                  "trialign: cu_seqlens must be int64 and contiguous");
  const int64_t *starts = cu_seqlens.const_data_ptr<int64_t>(), last = cu_seqlens.numel() - 1;
  STD_TORCH_CHECK(starts[0] >= 0 && starts[last] <= total, "cu_seqlens must lie within 0 and ", total);
  for (int64_t i = 0; i < last; ++i)
    STD_TORCH_CHECK(starts[i] <= starts[i + 1] && starts[i + 1] - starts[i] <= longest, "document ", i, " has ",
                    starts[i + 1] - starts[i], " tokens, allowed are 0 to ", longest);
  return starts;
}

}  // namespace
