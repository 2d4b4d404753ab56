// Checks of an op's tensors before it reads them by pointer; for the CPU and the CUDA side.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <string>

// Anonymous: each SIMD level has its own copy.
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[maybe_unused]] void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  bool same = tensor.dim() == int64_t(sizes.size());
  int64_t dim = 0;
  for (int64_t size : sizes) same = same && tensor.size(dim++) == size;
  if (same) return;
  const auto listed = [](int64_t count, const auto& size_of) {
    std::string text = "[";
    for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(size_of(i));
    return text + "]";
  };
  STD_TORCH_CHECK(false, "trialign: ", name, " is ", listed(tensor.dim(), [&](int64_t i) { return tensor.size(i); }), ", must be ",
                  listed(int64_t(sizes.size()), [&](int64_t i) { return sizes.begin()[i]; }));
}

[[maybe_unused]] void check_packed(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "trialign: ", name, " is ", torch::headeronly::toString(tensor.scalar_type()), ", must be ",
                  torch::headeronly::toString(dtype));
  check_sizes(tensor, name, sizes);
  STD_TORCH_CHECK(tensor.is_contiguous(), "trialign: ", name, " must be contiguous");
}
[[maybe_unused]] void check_packed(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> sizes) {
  if (tensor) check_packed(*tensor, name, dtype, sizes);
}

}  // namespace

// CHECK_SIZES(weight, h): the sizes; CHECK_PACKED(weight, x.scalar_type(), h): dtype, sizes and contiguous. A missing optional passes.
#define CHECK_SIZES(tensor, ...) check_sizes(tensor, #tensor, {__VA_ARGS__})
#define CHECK_PACKED(tensor, dtype, ...) check_packed(tensor, #tensor, dtype, {__VA_ARGS__})
#define CHECK_CONTIGUOUS(tensor) STD_TORCH_CHECK((tensor).is_contiguous(), "trialign: " #tensor " must be contiguous")
