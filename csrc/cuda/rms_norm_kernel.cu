// RMSNorm with or without the residual added first. Formulas: kernels/rms_norm.py. One block a row; backward: ROWS rows a block.
#include "../common.cuh"

namespace {

constexpr int threads = 256, rows_per_block = 16;

template <typename T>
__global__ void __launch_bounds__(threads) forward(const T* x, const T* residual, const T* weight, T* y, T* total, float* rstd, int64_t h, float eps) {
  __shared__ float room[33];
  const int64_t row = blockIdx.x;
  x += row * h, y += row * h;
  const T* normed = x;
  float squares = 0;
  if (residual) {
    residual += row * h, total += row * h;
    for (int64_t j = threadIdx.x; j < h; j += threads) put(total + j, get(x[j]) + get(residual[j]));
    normed = total;  // each thread reads back only what it wrote
  }
  for (int64_t j = threadIdx.x; j < h; j += threads) squares += get(normed[j]) * get(normed[j]);
  const float r = 1.f / sqrtf(block_sum(squares, room) / float(h) + eps);
  for (int64_t j = threadIdx.x; j < h; j += threads) put(y + j, get(normed[j]) * r * get(weight[j]));
  if (threadIdx.x == 0) rstd[row] = r;
}

// Each thread owns columns, so its sums of d weight need no atomics: partial[block] is the block's part.
template <typename T>
__global__ void __launch_bounds__(threads)
    backward(const T* grad, const T* x, const T* weight, const float* rstd, const T* through, T* grad_x, float* partial, int64_t n, int64_t h) {
  __shared__ float room[33];
  float* share = partial + blockIdx.x * h;
  for (int64_t j = threadIdx.x; j < h; j += threads) share[j] = 0;
  for (int64_t row = int64_t(blockIdx.x) * rows_per_block; row < n && row < (int64_t(blockIdx.x) + 1) * rows_per_block; ++row) {
    const T *g = grad + row * h, *v = x + row * h;
    float dot = 0;
    for (int64_t j = threadIdx.x; j < h; j += threads) dot += get(g[j]) * get(weight[j]) * get(v[j]);
    const float r = rstd[row], c = block_sum(dot, room) * r * r / float(h);
    for (int64_t j = threadIdx.x; j < h; j += threads) {
      const float gj = get(g[j]), vj = get(v[j]);
      share[j] += gj * vj * r;
      float d = (gj * get(weight[j]) - vj * c) * r;
      if (through) d += get(through[row * h + j]);
      put(grad_x + row * h + j, d);
    }
  }
}

}  // namespace

// residual, total: null for the plain norm.
extern "C" int launch_rms_norm(int dtype, const void* x, const void* residual, const void* weight, void* y, void* total, float* rstd, int64_t n,
                               int64_t h, float eps, cudaStream_t stream) {
  BY_NUMBER(dtype, T, [&] {
    LAUNCH(forward<T>, dim3(unsigned(n)), dim3(threads), 0, stream, static_cast<const T*>(x), static_cast<const T*>(residual),
           static_cast<const T*>(weight), static_cast<T*>(y), static_cast<T*>(total), rstd, h, eps);
  });
  return LAUNCH_STATUS();
}

extern "C" int64_t rms_norm_blocks(int64_t n) { return (n + rows_per_block - 1) / rows_per_block; }

// partial: [rms_norm_blocks(n), h]; its sum over the blocks is d weight. through: null, or the gradient by the residual path.
extern "C" int launch_rms_norm_backward(int dtype, const void* grad, const void* x, const void* weight, const float* rstd, const void* through,
                                        void* grad_x, float* partial, int64_t n, int64_t h, cudaStream_t stream) {
  BY_NUMBER(dtype, T, [&] {
    LAUNCH(backward<T>, dim3(unsigned(rms_norm_blocks(n))), dim3(threads), 0, stream, static_cast<const T*>(grad), static_cast<const T*>(x),
           static_cast<const T*>(weight), rstd, static_cast<const T*>(through), static_cast<T*>(grad_x), partial, n, h);
  });
  return LAUNCH_STATUS();
}
