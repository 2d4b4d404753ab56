// One launch that shows whether this build's kernels run here: the runtime, the driver and the device's architecture fit.
#include <cuda_runtime.h>

namespace {

constexpr int answer = 42;
__global__ void probe(int* result) { *result = answer; }

}  // namespace

// Null where the current device gives the answer, else CUDA's own words, or that the answer was another.
extern "C" const char* launch_probe() {
  int* result = nullptr;
  int seen = 0;
  cudaError_t error = cudaMalloc(&result, sizeof(int));
  if (error == cudaSuccess) {
    probe<<<1, 1>>>(result);
    error = cudaGetLastError();
    if (error == cudaSuccess) error = cudaMemcpy(&seen, result, sizeof(int), cudaMemcpyDeviceToHost);
    cudaFree(result);
  }
  if (error != cudaSuccess) {
    cudaGetLastError();  // torch must not find it
    return cudaGetErrorString(error);
  }
  return seen == answer ? nullptr : "a kernel ran and wrote nothing";
}
