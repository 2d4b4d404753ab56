// The CUDA side of the ops whose schemas csrc/cpu declares: checks, outputs, stream; the kernels are csrc/cuda/*_kernel.cu.
// Built only with nvcc (TRIALIGN_CUDA); links nothing of torch beyond the CPU part's libraries.
#if defined(TRIALIGN_CUDA)
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "checks.h"

extern "C" {
int launch_rms_norm(int, const void*, const void*, const void*, void*, void*, float*, int64_t, int64_t, float, void*);
int64_t rms_norm_blocks(int64_t);
int launch_rms_norm_backward(int, const void*, const void*, const void*, const float*, const void*, void*, float*, int64_t, int64_t, void*);
int launch_gae(const float*, const float*, const uint8_t*, const int64_t*, float*, float*, int64_t, float, float, void*);
int launch_logprob_update(int, float*, const void*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, void*);
int launch_logprob_backward(int, const void*, void*, const int64_t*, const float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t,
                            float, void*);
int64_t sort_by_expert_room(int64_t, int);
int launch_sort_by_expert(const int64_t*, int*, int64_t*, int64_t*, int64_t, int, void*);
int launch_adamw(int, float*, float*, float*, const float*, void*, int64_t, float, float, float, float, float, float, float, void*);
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

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  CHECK_CONTIGUOUS(x);
  const int64_t n = x.size(0), h = x.size(1);
  CHECK_PACKED(weight, x.scalar_type(), h);
  Tensor y = fresh(x, {n, h}, x.scalar_type()), rstd = fresh(x, {n}, ScalarType::Float);
  const Place place(x);
  if (n) launched(launch_rms_norm(number(x), x.data_ptr(), nullptr, weight.data_ptr(), y.data_ptr(), nullptr, floats(rstd), n, h, float(eps), place.stream()));
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  CHECK_CONTIGUOUS(x);
  const int64_t n = x.size(0), h = x.size(1);
  CHECK_PACKED(residual, x.scalar_type(), n, h);
  CHECK_PACKED(weight, x.scalar_type(), h);
  Tensor y = fresh(x, {n, h}, x.scalar_type()), total = fresh(x, {n, h}, x.scalar_type()), rstd = fresh(x, {n}, ScalarType::Float);
  const Place place(x);
  if (n)
    launched(launch_rms_norm(number(x), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), total.data_ptr(), floats(rstd), n, h,
                             float(eps), place.stream()));
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                             std::optional<Tensor> grad_total) {
  CHECK_CONTIGUOUS(x);
  const int64_t n = x.size(0), h = x.size(1), blocks = rms_norm_blocks(n);
  CHECK_PACKED(grad, x.scalar_type(), n, h);
  CHECK_PACKED(weight, x.scalar_type(), h);
  CHECK_PACKED(rstd, ScalarType::Float, n);
  CHECK_PACKED(grad_total, x.scalar_type(), n, h);
  Tensor grad_x = fresh(x, {n, h}, x.scalar_type()), partial = fresh(x, {blocks, h}, ScalarType::Float);
  const Place place(x);
  if (n)
    launched(launch_rms_norm_backward(number(x), grad.data_ptr(), x.data_ptr(), weight.data_ptr(), floats(rstd),
                                      grad_total ? grad_total->data_ptr() : nullptr, grad_x.data_ptr(), floats(partial), n, h, place.stream()));
  const int64_t rows[] = {0};
  Tensor sum = torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1));
  return {grad_x, torch::stable::to(sum, x.scalar_type())};
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask, const Tensor& cu_seqlens, double gamma, double lam) {
  const int64_t total = rewards.numel(), sequences = cu_seqlens.numel() - 1;
  CHECK_PACKED(rewards, ScalarType::Float, total);
  CHECK_PACKED(values, ScalarType::Float, total);
  CHECK_PACKED(mask, ScalarType::Bool, total);
  CHECK_PACKED(cu_seqlens, ScalarType::Long, sequences + 1);
  Tensor advantages = fresh(rewards, {total}, ScalarType::Float), returns = fresh(rewards, {total}, ScalarType::Float);
  torch::stable::zero_(advantages);  // tokens outside every sequence
  torch::stable::zero_(returns);
  const Place place(rewards);
  if (sequences > 0)
    launched(launch_gae(floats(rewards), floats(values), static_cast<const uint8_t*>(mask.data_ptr()), static_cast<const int64_t*>(cu_seqlens.data_ptr()),
                        floats(advantages), floats(returns), sequences, float(gamma), float(lam), place.stream()));
  return {advantages, returns};
}

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

void adamw(Tensor master, Tensor exp_avg, Tensor exp_avg_sq, const Tensor& grad, const std::optional<Tensor>& param_out, double lr, double beta1,
           double beta2, double eps, double weight_decay, int64_t step, double grad_scale) {
  for (const Tensor* buffer : std::initializer_list<const Tensor*>{&master, &exp_avg, &exp_avg_sq, &grad})
    need(buffer->is_contiguous() && buffer->scalar_type() == ScalarType::Float && buffer->numel() == master.numel(),
         "adamw takes packed float32 tensors of one size");
  need(!param_out || (param_out->is_contiguous() && param_out->numel() == master.numel()), "adamw copies out to a packed tensor of the same size");
  const Place place(master);
  if (master.numel())
    launched(launch_adamw(param_out ? number(*param_out) : 0, floats(master), floats(exp_avg), floats(exp_avg_sq), floats(grad),
                          param_out ? param_out->data_ptr() : nullptr, master.numel(), float(beta1), float(beta2), float(1 - lr * weight_decay),
                          float(lr / (1 - std::pow(beta1, double(step)))), float(1 / std::sqrt(1 - std::pow(beta2, double(step)))), float(eps),
                          float(grad_scale), place.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(trialign, CUDA, ops) {
  ops.impl("rms_norm", TORCH_BOX(&rms_norm));
  ops.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  ops.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  ops.impl("gae", TORCH_BOX(&gae));
  ops.impl("logprob_stats", TORCH_BOX(&logprob_stats));
  ops.impl("logprob_update_", TORCH_BOX(&logprob_update_));
  ops.impl("logprob_backward", TORCH_BOX(&logprob_backward));
  ops.impl("logprob_backward_", TORCH_BOX(&logprob_backward_));
  ops.impl("sort_by_expert", TORCH_BOX(&sort_by_expert));
  ops.impl("adamw", TORCH_BOX(&adamw));
}
#endif
