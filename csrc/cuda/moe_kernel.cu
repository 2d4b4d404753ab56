// Mixture of experts: which slots go to which expert, by a stable counting sort. See kernels/moe.py.
// Three passes over blocks of `chunk` slots: the blocks' counts, where each block's part of each expert starts, the rows.
// Only integer sums race, so every run gives the same rows.
#include "../common.cuh"

namespace {

constexpr int threads = 256, warps = threads / 32, rounds = 4, chunk = threads * rounds;
constexpr unsigned all_lanes = 0xffffffffu;

__global__ void __launch_bounds__(threads) count(const int64_t* experts, int* counts, int64_t slots, int num_experts) {
  SHARED_DYN(int, hits);  // [num_experts]
  for (int e = threadIdx.x; e < num_experts; e += threads) hits[e] = 0;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * chunk;
  for (int i = threadIdx.x; i < chunk && first + i < slots; i += threads) atomicAdd(&hits[experts[first + i]], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += threads) counts[int64_t(blockIdx.x) * num_experts + e] = hits[e];
}

// counts [blocks, num_experts] becomes the first row of each block's part of each expert; offsets: the experts' first rows.
__global__ void __launch_bounds__(threads) starts(int* counts, int64_t* offsets, int64_t blocks, int num_experts) {
  __shared__ int sums[threads];
  const int tid = threadIdx.x;
  int64_t before = 0;  // rows of the experts of earlier iterations
  for (int base = 0; base < num_experts; base += threads) {
    const int e = base + tid;
    int total = 0;
    if (e < num_experts)
      for (int64_t b = 0; b < blocks; ++b) total += counts[b * num_experts + e];
    sums[tid] = total;
    __syncthreads();
    for (int step = 1; step < threads; step *= 2) {  // the running sum over the experts
      const int left = tid >= step ? sums[tid - step] : 0;
      __syncthreads();
      sums[tid] += left;
      __syncthreads();
    }
    if (e < num_experts) {
      int64_t row = before + sums[tid] - total;
      offsets[e] = row;
      for (int64_t b = 0; b < blocks; ++b) {
        const int own = counts[b * num_experts + e];
        counts[b * num_experts + e] = int(row);
        row += own;
      }
    }
    before += sums[threads - 1];
    __syncthreads();  // the next iteration overwrites sums
  }
  if (tid == 0) offsets[num_experts] = before;
}

// A warp owns `rounds` times 32 slots in a row; lanes with the same expert rank by lane.
__global__ void __launch_bounds__(threads) rank(const int64_t* experts, const int* starts, int64_t* order, int64_t slots, int num_experts) {
  SHARED_DYN(int, next);  // [warps, num_experts]: the row of the warp's next slot of that expert
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int* mine = next + warp * num_experts;
  for (int i = threadIdx.x; i < warps * num_experts; i += threads) next[i] = 0;
  __syncthreads();
  const int64_t first = int64_t(blockIdx.x) * chunk + warp * (32 * rounds) + lane;
  int own[rounds];
#pragma unroll
  for (int r = 0; r < rounds; ++r) {
    own[r] = first + 32 * r < slots ? int(experts[first + 32 * r]) : -1;
    if (own[r] >= 0) atomicAdd(&mine[own[r]], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += threads) {
    int row = starts[int64_t(blockIdx.x) * num_experts + e];
    for (int w = 0; w < warps; ++w) {
      const int hits = next[w * num_experts + e];
      next[w * num_experts + e] = row;
      row += hits;
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < rounds; ++r) {
    const unsigned peers = __match_any_sync(all_lanes, own[r]);
    const int before = __popc(peers & ((1u << lane) - 1));
    if (own[r] >= 0) order[mine[own[r]] + before] = first + 32 * r;
    __syncwarp();
    if (own[r] >= 0 && before == 0) mine[own[r]] += __popc(peers);
    __syncwarp();
  }
}

}  // namespace

// Number of int32 of scratch memory for the sort.
extern "C" int64_t sort_by_expert_room(int64_t slots, int num_experts) { return (slots + chunk - 1) / chunk * num_experts; }

extern "C" int launch_sort_by_expert(const int64_t* experts, int* room, int64_t* order, int64_t* offsets, int64_t slots, int num_experts,
                                     cudaStream_t stream) {
  const int64_t blocks = (slots + chunk - 1) / chunk;
  const size_t bytes = size_t(num_experts) * sizeof(int);
  if (blocks) LAUNCH(count, dim3(unsigned(blocks)), dim3(threads), bytes, stream, experts, room, slots, num_experts);
  LAUNCH(starts, dim3(1), dim3(threads), 0, stream, room, offsets, blocks, num_experts);
  if (blocks) LAUNCH(rank, dim3(unsigned(blocks)), dim3(threads), warps * bytes, stream, experts, room, order, slots, num_experts);
  return LAUNCH_STATUS();
}
