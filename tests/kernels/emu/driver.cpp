// Runs the CUDA kernels on the CPU at awkward sizes, for the sanitizers: every buffer is a heap block of its exact size.
// `driver` runs all, `driver NAME...` those named. Built with csrc/cuda/*.cu under cuda_emu.h by tests/support/kernels/emu_build.py.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

extern "C" {
int launch_logprob_update(int, float*, const void*, const int64_t*, int64_t, int64_t, int64_t, int64_t, float, void*);
int launch_logprob_backward(int, const void*, void*, const int64_t*, const float*, const float*, const float*, int64_t, int64_t, int64_t, int64_t,
                            float, void*);
int64_t sort_by_expert_room(int64_t, int);
int launch_sort_by_expert(const int64_t*, int*, int64_t*, int64_t*, int64_t, int, void*);
}

namespace {

constexpr int HALF = 2;
std::mt19937 engine(0);

// n random fp32 numbers; as 2-byte numbers the same memory holds 2 n, all small.
std::vector<float> random(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> values(n);
  for (float& value : values) value = normal(engine);
  return values;
}
// n fp16 numbers between 1 and 2.
std::vector<uint16_t> halves(int64_t n) {
  std::vector<uint16_t> values(n);
  for (uint16_t& value : values) value = uint16_t(0x3c00 | (engine() & 0x3ff));
  return values;
}

void logprob() {
  const int64_t n = 2, v = 1030;
  const std::vector<int64_t> labels = {3, 1029};
  std::vector<float> g = random(n), ge = random(n), stats(4 * n);
  for (int64_t offset : {0, 1}) {  // at 1 the rows do not start at a multiple of 16 bytes
    std::vector<uint16_t> logits = halves(offset + n * v), out(offset + n * v);
    std::fill(stats.begin(), stats.end(), 0.f);
    std::fill(stats.begin(), stats.begin() + n, -1e30f);
    launch_logprob_update(HALF, stats.data(), logits.data() + offset, labels.data(), n, v, v, 0, 0.7f, nullptr);
    launch_logprob_backward(HALF, logits.data() + offset, out.data() + offset, labels.data(), stats.data(), g.data(), ge.data(), n, v, v, 0, 0.7f, nullptr);
  }
}

void moe() {
  const int64_t slots = 2500;
  for (int experts : {3, 300}) {
    std::vector<int64_t> expert(slots), order(slots), offsets(experts + 1);
    for (int64_t& e : expert) e = engine() % experts;
    std::vector<int> room(sort_by_expert_room(slots, experts));
    launch_sort_by_expert(expert.data(), room.data(), order.data(), offsets.data(), slots, experts, nullptr);
    for (int64_t r = 1; r < slots; ++r)
      if (expert[order[r]] < expert[order[r - 1]] || (expert[order[r]] == expert[order[r - 1]] && order[r] <= order[r - 1])) {
        std::printf("row %lld is not in order\n", (long long)r);
        std::exit(1);
      }
  }
}

struct Run {
  const char* name;
  void (*run)();
};
constexpr Run runs[] = {{"logprob", logprob}, {"moe", moe}};

}  // namespace

int main(int count, char** names) {
  for (const Run& entry : runs) {
    bool wanted = count == 1;
    for (int i = 1; i < count; ++i) wanted |= !std::strcmp(names[i], entry.name);
    if (wanted) entry.run();
  }
}
