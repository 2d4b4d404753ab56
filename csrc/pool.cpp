// The pool of pool.h. Idle threads spin for a while, then sleep; while another process contends for the cores, callers run alone.
#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define TRIALIGN_FORKS
#endif

namespace trialign {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

constexpr int most_threads = 256;
// Between two jobs of a decode step lie tens of microseconds; to wake a thread that sleeps takes as long.
constexpr auto awake = microseconds(300);
// The caller's wait for others' last pieces: then it sleeps, so that the scheduler may give its core to one of them.
constexpr auto patience = microseconds(50);
// No piece takes so long: a thread that was away for it, or let others wait for it, was kept from its core.
constexpr auto kept_off = microseconds(1000);
// For so long callers then run alone: at first as OpenMP's threads spin after their last job, then longer each time that the core turns out
// to be still taken, which costs about a time slice of the scheduler (3 ms).
constexpr auto alone_first = microseconds(5000), alone_most = microseconds(160000);

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// A thread's part of the items: the thread takes from its front, others from its end. Both bounds are in one word.
struct alignas(64) Share {
  std::atomic<uint64_t> bounds{0};

  static uint64_t pack(uint64_t begin, uint64_t end) { return end << 32 | begin; }

  bool take(int64_t grain, bool front, int64_t& begin, int64_t& end) {
    uint64_t now = bounds.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t first = int64_t(now & 0xffffffffu), last = int64_t(now >> 32), left = last - first;
      if (left <= 0) return false;
      const int64_t taken = std::min(left, grain);
      const uint64_t rest = front ? pack(first + taken, last) : pack(first, last - taken);
      if (bounds.compare_exchange_weak(now, rest, std::memory_order_acq_rel, std::memory_order_relaxed)) {
        begin = front ? first : last - taken;
        end = begin + taken;
        return true;
      }
    }
  }
};

class Pool {
 public:
  bool run(int64_t n, int64_t grain, int64_t threads, void (*fn)(void*, int64_t, int64_t), void* context) {
    if (Clock::now().time_since_epoch().count() < alone_until_.load(std::memory_order_relaxed)) return false;
    std::unique_lock<std::mutex> lock(callers_, std::try_to_lock);
    if (!lock) return false;
    threads = std::min<int64_t>({threads, most_threads, n});
    for (; started_ < threads - 1; ++started_) std::thread(&Pool::serve, this, started_ + 1).detach();
    fn_ = fn, context_ = context, grain_ = grain, threads_ = threads;
    for (int64_t i = 0; i < threads; ++i)
      shares_[i].bounds.store(Share::pack(n * i / threads, n * (i + 1) / threads), std::memory_order_relaxed);
    number_ = (number_ + 1) & 0x7fffffffu;
    gate_.store(uint64_t(number_) << 33 | open, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      bell_.fetch_add(1, std::memory_order_release);
      bell_.notify_all();
    }
    const auto start = Clock::now();
    work(0);
    if (uint32_t(gate_.fetch_and(~open, std::memory_order_acq_rel)) != 0) wait_for_others(start);
    return true;
  }

 private:
  static constexpr uint64_t open = uint64_t(1) << 32;  // gate_: job number << 33 | open << 32 | threads inside

  void work(int64_t own) {
    int64_t begin, end;
    for (int64_t i = 0; i < threads_; ++i) {
      Share& share = shares_[(own + i) % threads_];
      while (share.take(grain_, i == 0, begin, end)) fn_(context_, begin, end);
    }
  }

  void wait_for_others(Clock::time_point start) {
    const auto done = Clock::now();
    bool sleeps = false;
    while (uint32_t inside = uint32_t(gate_.load(std::memory_order_acquire))) {
      if (!sleeps && Clock::now() - done < patience) {
        relax();
        continue;
      }
      sleeps = true;
      waiting_.store(true, std::memory_order_seq_cst);
      const uint32_t rung = done_bell_.load(std::memory_order_acquire);
      inside = uint32_t(gate_.load(std::memory_order_seq_cst));
      if (inside) done_bell_.wait(rung, std::memory_order_acquire);
    }
    waiting_.store(false, std::memory_order_relaxed);
    const auto now = Clock::now();
    if (now - done > std::max<Clock::duration>(kept_off, done - start)) contended(now);
  }

  void contended(Clock::time_point now) {
    const Clock::time_point last(Clock::duration(alone_until_.load(std::memory_order_relaxed)));
    if (now < last) return;
    const auto span = Clock::duration(alone_span_.load(std::memory_order_relaxed));
    const auto next = now - last < 2 * span ? std::min<Clock::duration>(2 * span, alone_most) : Clock::duration(alone_first);
    alone_span_.store(next.count(), std::memory_order_relaxed);
    alone_until_.store((now + next).time_since_epoch().count(), std::memory_order_relaxed);
  }

  // Thread `own` of the pool: enters each open job once.
  void serve(int64_t own) {
    uint64_t last = 0;  // gate_ >> 33 of the last job seen
    for (;;) {
      uint64_t now = await(last);
      last = now >> 33;
      while (now & open && now >> 33 == last) {
        if (!gate_.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
        if (own < threads_) work(own);
        if (uint32_t(gate_.fetch_sub(1, std::memory_order_seq_cst)) == 1 && waiting_.load(std::memory_order_seq_cst)) {
          done_bell_.fetch_add(1, std::memory_order_release);
          done_bell_.notify_all();
        }
        break;
      }
    }
  }

  // The gate once it shows another job than `last`.
  uint64_t await(uint64_t last) {
    auto start = Clock::now(), before = start;
    for (;;) {
      for (int i = 0; i < 16; ++i) {
        const uint64_t now = gate_.load(std::memory_order_acquire);
        if (now >> 33 != last) return now;
        relax();
      }
      const auto now = Clock::now();
      if (now - before > kept_off) contended(now);
      before = now;
      if (now - start < awake) continue;
      const uint32_t rung = bell_.load(std::memory_order_acquire);
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      if (gate_.load(std::memory_order_seq_cst) >> 33 == last) bell_.wait(rung, std::memory_order_acquire);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      start = before = Clock::now();
    }
  }

  std::mutex callers_;
  int64_t started_ = 0;
  uint64_t number_ = 0;
  std::atomic<int64_t> alone_until_{0}, alone_span_{0};  // in ticks of Clock
  void (*fn_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t grain_ = 1, threads_ = 0;
  Share shares_[most_threads];
  alignas(64) std::atomic<uint64_t> gate_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<uint32_t> sleepers_{0};
  alignas(64) std::atomic<uint32_t> done_bell_{0};
  std::atomic<bool> waiting_{false};
};

// Never destroyed: its threads run until the process ends. A child of a fork has none of them, so it gets a new pool.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  Pool* made = the_pool.load(std::memory_order_acquire);
  if (made) return *made;
  Pool* mine = new Pool;
  if (the_pool.compare_exchange_strong(made, mine, std::memory_order_acq_rel)) {
#if defined(TRIALIGN_FORKS)
    static std::once_flag once;
    std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr, std::memory_order_relaxed); }); });
#endif
    return *mine;
  }
  delete mine;
  return *made;
}

}  // namespace

void run_pieces(int64_t n, int64_t grain, int64_t threads, void (*fn)(void*, int64_t, int64_t), void* context) {
  const bool fits = threads > 1 && n > grain && n < (int64_t(1) << 32);
  if (fits && pool().run(n, grain, threads, fn, context)) return;
  for (int64_t i = 0; i < n; i += grain) fn(context, i, std::min(n, i + grain));
}

}  // namespace trialign
