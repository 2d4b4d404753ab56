// Shared parts of the CUDA kernels. The .cu files build under nvcc and, for the tests, as C++ under tests/kernels/emu.
#pragma once
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<grid, block, smem, stream>>>(__VA_ARGS__)
#define LAUNCH_STATUS() int(cudaGetLastError())
#define SHARED_DYN(T, name)                                          \
  extern __shared__ __align__(16) unsigned char name##_raw[];        \
  T* name = reinterpret_cast<T*>(name##_raw)
#else
#include "cuda_emu.h"
#define LAUNCH_STATUS() 0
#endif
#include <cmath>
#include <cstdint>

enum DType { FLOAT = 0, BFLOAT16 = 1, HALF = 2 };  // element types, as the host passes them

// Runs the lambda with T the element type.
#define BY_NUMBER(dtype, T, ...)        \
  do {                                  \
    if ((dtype) == FLOAT) {             \
      using T = float;                  \
      __VA_ARGS__();                    \
    } else if ((dtype) == BFLOAT16) {   \
      using T = __nv_bfloat16;          \
      __VA_ARGS__();                    \
    } else {                            \
      using T = __half;                 \
      __VA_ARGS__();                    \
    }                                   \
  } while (0)

__device__ inline float get(float x) { return x; }
__device__ inline float get(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float get(__half x) { return __half2float(x); }
__device__ inline void put(float* p, float x) { *p = x; }
__device__ inline void put(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ inline void put(__half* p, float x) { *p = __float2half_rn(x); }

// 16 bytes at once.
template <typename T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T item[size];
};
template <typename T>
__host__ __device__ inline bool packable(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}
