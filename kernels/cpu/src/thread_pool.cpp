// The pool: workers spin for a moment after each job, since the next op of a step follows within microseconds, then
// block.

#include "thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr auto kSpin = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns true once the condition holds, false when the time to spin is over.
template <class Condition>
bool spin_until(Condition condition) {
  if (condition()) return true;
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Indices [begin, end) that are still to be taken. Their owner takes the first, so that it goes up through memory;
// other threads, when they have no more of their own, take the last.
class alignas(64) Share {
 public:
  void set(int64_t begin, int64_t end) { ends_.store(pack(begin, end), std::memory_order_relaxed); }

  // Puts the index into `taken`; returns false when none is left.
  bool take_first(int64_t& taken) { return take(taken, true); }
  bool take_last(int64_t& taken) { return take(taken, false); }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(begin);
  }

  bool take(int64_t& taken, bool is_first) {
    uint64_t ends = ends_.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = static_cast<int64_t>(ends & 0xffffffff), end = static_cast<int64_t>(ends >> 32);
      if (begin >= end) return false;
      taken = is_first ? begin : end - 1;
      const uint64_t rest = is_first ? pack(begin + 1, end) : pack(begin, end - 1);
      if (ends_.compare_exchange_weak(ends, rest, std::memory_order_relaxed)) return true;
    }
  }

  std::atomic<uint64_t> ends_{0};
};

class ThreadPool {
 public:
  explicit ThreadPool(int count) : num_threads_(count) {}

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

  void set_num_threads(int count) {
    const std::lock_guard<std::mutex> only(running_);
    stop_workers();
    num_threads_ = count < 1 ? 1 : count;
  }

  // For the end of the process: later jobs run on their caller alone.
  void retire() {
    const std::lock_guard<std::mutex> only(running_);
    stop_workers();
    num_threads_ = 1;
  }

  void run(int64_t count, IndexedBody body, void* context) {
    if (count <= 1 || num_threads() == 1) {
      for (int64_t i = 0; i < count; ++i) body(context, i);
      return;
    }
    const std::lock_guard<std::mutex> only(running_);
    start_workers();
    body_ = body;
    context_ = context;
    const int64_t num_shares = static_cast<int64_t>(shares_.size());
    for (int64_t i = 0; i < num_shares; ++i) shares_[i].set(count * i / num_shares, count * (i + 1) / num_shares);
    const uint64_t job = (state_.load(std::memory_order_relaxed) / kJob + 1) * kJob;
    state_.store(job | kOpen);
    if (num_sleeping_.load() > 0) {
      const std::lock_guard<std::mutex> lock(sleeping_);
      has_work_.notify_all();
    }
    take_indices(0);
    state_.fetch_and(~kOpen);
    wait_until_all_left();
  }

 private:
  // state_: number of the job, whether it may be entered, and how many workers are inside.
  static constexpr uint64_t kJob = 1 << 16;
  static constexpr uint64_t kOpen = 1 << 15;
  static constexpr uint64_t kInside = kOpen - 1;

  // Takes all of a thread's own share, then what is left of the others'.
  void take_indices(size_t thread) {
    int64_t i;
    while (shares_[thread].take_first(i)) body_(context_, i);
    for (size_t k = 1; k < shares_.size(); ++k) {
      Share& other = shares_[(thread + k) % shares_.size()];
      while (other.take_last(i)) body_(context_, i);
    }
  }

  void wait_until_all_left() {
    const auto all_left = [this] { return (state_.load() & kInside) == 0; };
    if (spin_until(all_left)) return;
    std::unique_lock<std::mutex> lock(sleeping_);
    is_caller_waiting_.store(true);
    all_left_.wait(lock, all_left);
    is_caller_waiting_.store(false);
  }

  bool try_enter(uint64_t& last_job) {
    uint64_t state = state_.load();
    while ((state & kOpen) != 0 && state / kJob != last_job) {
      if (state_.compare_exchange_weak(state, state + 1)) {
        last_job = state / kJob;
        return true;
      }
    }
    return false;
  }

  void leave() {
    if ((state_.fetch_sub(1) & (kInside | kOpen)) != 1) return;
    if (!is_caller_waiting_.load()) return;
    const std::lock_guard<std::mutex> lock(sleeping_);
    all_left_.notify_all();
  }

  void work(size_t thread) {
    uint64_t last_job = 0;
    const auto is_new = [&] {
      const uint64_t state = state_.load(std::memory_order_relaxed);
      return ((state & kOpen) != 0 && state / kJob != last_job) || is_stopping_.load(std::memory_order_relaxed);
    };
    while (!is_stopping_.load()) {
      if (!spin_until(is_new)) {
        std::unique_lock<std::mutex> lock(sleeping_);
        num_sleeping_.fetch_add(1);
        has_work_.wait(lock, is_new);
        num_sleeping_.fetch_sub(1);
      }
      if (try_enter(last_job)) {
        take_indices(thread);
        leave();
      }
    }
  }

  void start_workers() {
    if (!workers_.empty()) return;
    shares_ = std::vector<Share>(num_threads());
    for (size_t i = 1; i < shares_.size(); ++i) workers_.emplace_back([this, i] { work(i); });
  }

  void stop_workers() {
    {
      const std::lock_guard<std::mutex> lock(sleeping_);
      is_stopping_.store(true);
      has_work_.notify_all();
    }
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    is_stopping_.store(false);
  }

  std::mutex running_;  // held by the one caller whose job runs
  std::atomic<int> num_threads_;
  std::vector<std::thread> workers_;
  std::vector<Share> shares_;  // the caller's, then one for each worker

  IndexedBody body_ = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint64_t> state_{0};

  alignas(64) std::mutex sleeping_;
  std::condition_variable has_work_, all_left_;
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> is_caller_waiting_{false};
  std::atomic<bool> is_stopping_{false};
};

std::atomic<ThreadPool*> pool{nullptr};

// Workers do not survive a fork and locks may be held by threads that are gone: the child leaves the old pool behind.
void replace_in_child() { pool = new ThreadPool(pool.load()->num_threads()); }

struct Lifetime {
  Lifetime() {
    pool = new ThreadPool(1);
    pthread_atfork(nullptr, nullptr, replace_in_child);
  }
  ~Lifetime() { pool.load()->retire(); }
} lifetime;

}  // namespace

int num_threads() { return pool.load()->num_threads(); }

void set_num_threads(int count) { pool.load()->set_num_threads(count); }

void run_indices(int64_t count, IndexedBody body, void* context) { pool.load()->run(count, body, context); }

extern "C" {

void pathfox_set_num_threads(int32_t count) { set_num_threads(count); }
int32_t pathfox_num_threads() { return num_threads(); }

// The instruction set that this object was built for; the names of kernels/cpu/isa.py.
const char* pathfox_isa() {
#if defined(__AVX512VNNI__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}
}
