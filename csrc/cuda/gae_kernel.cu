// GAE over packed sequences, one warp a sequence, 32 tokens at a time from its end. Formulas: kernels/gae.py.
// A token's next value and next advantage are affine maps of those after the step's 32 tokens (a masked token's map is the
// identity), so both recursions are scans of maps by shuffles.
#include "../common.cuh"

namespace {

constexpr int warps = 4;

struct Map {
  float slope, offset;
};
__device__ inline Map after(Map outer, Map inner) { return {outer.slope * inner.slope, outer.slope * inner.offset + outer.offset}; }

// The map of lanes lane..31 together, lane's own outermost.
__device__ inline Map reverse_scan(Map map, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Map inner{__shfl_down_sync(0xffffffffu, map.slope, step), __shfl_down_sync(0xffffffffu, map.offset, step)};
    if (lane + step < 32) map = after(map, inner);
  }
  return map;
}

__global__ void __launch_bounds__(warps * 32)
    scan(const float* rewards, const float* values, const uint8_t* mask, const int64_t* cu_seqlens, float* advantages, float* returns,
         int64_t sequences, float gamma, float lam) {
  const int lane = threadIdx.x & 31;
  const int64_t sequence = int64_t(blockIdx.x) * warps + (threadIdx.x >> 5);
  if (sequence >= sequences) return;  // whole warps leave, and no barrier follows
  const int64_t start = cu_seqlens[sequence], end = cu_seqlens[sequence + 1];
  float later_value = 0, later_advantage = 0;
  for (int64_t low = end - 32; low > start - 32; low -= 32) {
    const int64_t token = low + lane;
    const bool here = token >= start, kept = here && mask[token];
    const float value = kept ? values[token] : 0.f, reward = kept ? rewards[token] : 0.f;
    // The scan of later tokens: lane i takes lane i + 1's map, the last lane the carry itself.
    Map seen = reverse_scan(kept ? Map{0, value} : Map{1, 0}, lane);
    const float slope = __shfl_down_sync(0xffffffffu, seen.slope, 1), offset = __shfl_down_sync(0xffffffffu, seen.offset, 1);
    const float next_value = lane == 31 ? later_value : slope * later_value + offset;
    const float delta = reward + gamma * next_value - value;
    const Map whole = reverse_scan(kept ? Map{gamma * lam, delta} : Map{1, 0}, lane);
    const float advantage = whole.slope * later_advantage + whole.offset;
    if (here) {
      advantages[token] = kept ? advantage : 0.f;
      returns[token] = kept ? advantage + value : 0.f;
    }
    later_advantage = __shfl_sync(0xffffffffu, advantage, 0);
    later_value = __shfl_sync(0xffffffffu, kept ? value : next_value, 0);
  }
}

}  // namespace

extern "C" int launch_gae(const float* rewards, const float* values, const uint8_t* mask, const int64_t* cu_seqlens, float* advantages,
                          float* returns, int64_t sequences, float gamma, float lam, cudaStream_t stream) {
  LAUNCH(scan, dim3(unsigned((sequences + warps - 1) / warps)), dim3(warps * 32), 0, stream, rewards, values, mask, cu_seqlens, advantages, returns,
         sequences, gamma, lam);
  return LAUNCH_STATUS();
}
