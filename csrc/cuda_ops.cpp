// The CUDA side of the ops whose schemas csrc/cpu declares: checks, outputs, stream; the kernels are csrc/cuda/*_kernel.cu.
// kernels/backends/cuda_cpp.py registers them at the first CUDA tensor, where a probe launch succeeds.
// Built only with nvcc (TRIALIGN_CUDA); links nothing of torch beyond the CPU part's libraries.
#if defined(TRIALIGN_CUDA)
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"

extern "C" {
int launch_logprob_update(int, float*, const void*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, void*);
int launch_logprob_backward(int, const void*, void*, const int64_t*, const float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t,
                            float, void*);
int64_t sort_by_expert_room(int64_t, int);
int launch_sort_by_expert(const int64_t*, int*, int64_t*, int64_t*, int64_t, int, void*);
const char* launch_probe();
}

namespace {

Tensor fresh(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

// The tensor's device and its current stream, for the length of one call.
class Place {
 public:
  explicit Place(const Tensor& tensor) : guard_(tensor.get_device_index()), stream_(torch::stable::accelerator::getCurrentStream(tensor.get_device_index())) {}
  void* stream() const { return stream_.nativeHandle(); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
};

int number(const Tensor& tensor) {  // as enum DType of common.cuh
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "trialign: must be float32, bfloat16 or float16");
  return dtype == ScalarType::Float ? 0 : dtype == ScalarType::BFloat16 ? 1 : 2;
}
void need(bool satisfied, const char* message) { STD_TORCH_CHECK(satisfied, "trialign: ", message); }
void launched(int status) { STD_TORCH_CHECK(status == 0, "trialign: CUDA error ", status, " at launch"); }
float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }
const float* floats(const std::optional<Tensor>& tensor) { return tensor ? floats(*tensor) : nullptr; }

void logprob_update_(const Tensor& stats, const Tensor& logits, const Tensor& labels, double scale, int64_t vocab_start) {
  CHECK_PACKED(stats, ScalarType::Float, 4, logits.size(0));
  CHECK_PACKED(labels, ScalarType::Long, logits.size(0));
  need(logits.stride(1) == 1 && scale > 0, "logprob takes packed rows of logits and a positive scale");
  const Place place(logits);
  if (logits.size(0))
    launched(launch_logprob_update(number(logits), floats(stats), logits.data_ptr(), static_cast<const int64_t*>(labels.data_ptr()), logits.size(0),
                                   logits.size(1), logits.stride(0), vocab_start, float(scale), place.stream()));
}

Tensor logprob_stats(const Tensor& logits, const Tensor& labels, double scale, int64_t vocab_start) {
  Tensor stats = fresh(logits, {4, logits.size(0)}, ScalarType::Float);
  torch::stable::zero_(stats);
  Tensor maxima = torch::stable::select(stats, 0, 0);
  torch::stable::fill_(maxima, -std::numeric_limits<double>::infinity());
  logprob_update_(stats, logits, labels, scale, vocab_start);
  return stats;
}

void backward_into(const Tensor& to, const Tensor& logits, const Tensor& labels, const Tensor& stats, const std::optional<Tensor>& grad_logprob,
                   const std::optional<Tensor>& grad_entropy, double scale, int64_t vocab_start) {
  const int64_t n = logits.size(0);
  CHECK_PACKED(stats, ScalarType::Float, 4, n);
  CHECK_PACKED(labels, ScalarType::Long, n);
  CHECK_PACKED(grad_logprob, ScalarType::Float, n);
  CHECK_PACKED(grad_entropy, ScalarType::Float, n);
  need(to.is_contiguous() && logits.stride(1) == 1, "logprob_backward takes packed rows of logits");
  const Place place(logits);
  if (logits.numel())
    launched(launch_logprob_backward(number(logits), logits.data_ptr(), to.data_ptr(), static_cast<const int64_t*>(labels.data_ptr()), floats(stats),
                                     floats(grad_logprob), floats(grad_entropy), logits.size(0), logits.size(1), logits.stride(0), vocab_start,
                                     float(scale), place.stream()));
}

Tensor logprob_backward(const Tensor& logits, const Tensor& labels, const Tensor& stats, std::optional<Tensor> grad_logprob,
                        std::optional<Tensor> grad_entropy, double scale, int64_t vocab_start) {
  Tensor result = fresh(logits, {logits.size(0), logits.size(1)}, logits.scalar_type());
  backward_into(result, logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start);
  return result;
}

void logprob_backward_(const Tensor& logits, const Tensor& labels, const Tensor& stats, std::optional<Tensor> grad_logprob,
                       std::optional<Tensor> grad_entropy, double scale, int64_t vocab_start) {
  backward_into(logits, logits, labels, stats, grad_logprob, grad_entropy, scale, vocab_start);
}

std::tuple<Tensor, Tensor> sort_by_expert(const Tensor& experts, int64_t num_experts) {
  const int64_t slots = experts.numel();
  need(experts.is_contiguous() && experts.scalar_type() == ScalarType::Long && slots < int64_t(1) << 31, "sort_by_expert takes packed int64, below 2^31");
  need(0 < num_experts && num_experts <= 1024, "sort_by_expert sorts by 1 to 1024 experts");  // shared memory: 32 bytes an expert
  Tensor order = fresh(experts, {slots}, ScalarType::Long), offsets = fresh(experts, {num_experts + 1}, ScalarType::Long);
  Tensor room = fresh(experts, {sort_by_expert_room(slots, int(num_experts))}, ScalarType::Int);
  const Place place(experts);
  launched(launch_sort_by_expert(static_cast<const int64_t*>(experts.data_ptr()), static_cast<int*>(room.data_ptr()),
                                 static_cast<int64_t*>(order.data_ptr()), static_cast<int64_t*>(offsets.data_ptr()), slots, int(num_experts),
                                 place.stream()));
  return {order, offsets};
}

}  // namespace

namespace trialign {

const char* cuda_problem() { return launch_probe(); }

void register_cuda() {
  static torch::stable::detail::StableLibrary ops{
      torch::stable::detail::StableLibrary::Kind::IMPL, "trialign", "CUDA", __FILE__, __LINE__};
  ops.impl("logprob_stats", TORCH_BOX(&logprob_stats));
  ops.impl("logprob_update_", TORCH_BOX(&logprob_update_));
  ops.impl("logprob_backward", TORCH_BOX(&logprob_backward));
  ops.impl("logprob_backward_", TORCH_BOX(&logprob_backward_));
  ops.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
}

}  // namespace trialign
#endif
