// The pool: workers spin for a moment after each job, since the next op of a step follows within microseconds, then
// block.

#include "thread_pool.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr Clock::duration kSpin = microseconds(50);

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
  const auto end = Clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return true;
      relax();
    }
  } while (Clock::now() < end);
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

// How many workers may help. Beside something else that keeps a core busy, a thread is put off its core for
// milliseconds with work in its hands, and the others wait: one thread fewer is then faster. So the time that the caller
// loses in jobs is set against the time that it spends in them; when too much is lost, one helper is left out for a
// while, longer each time that trying again fails.
class Crowding {
 public:
  explicit Crowding(int num_workers) : num_workers_(num_workers), num_helpers_(num_workers) {}

  int num_helpers(Clock::time_point now) {
    if (num_helpers_ < num_workers_ && now >= try_again_at_) {
      ++num_helpers_;
      try_again_at_ = now + rest_;
    }
    return num_helpers_;
  }

  // To be told of every job, by its caller. `spun` is the part of its time that went into waiting without sleeping.
  void judge(Clock::time_point begun, Clock::time_point ended, Clock::duration spun) {
    const Clock::duration gap = begun - std::exchange(last_ended_, ended);
    if (gap > kLongestGap || caller_ != std::this_thread::get_id()) return open_window();
    in_jobs_ += ended - begun;
    elsewhere_ += gap + spun;
    if (in_jobs_ < kWindow) return;
    const Clock::duration lost = in_jobs_ + elsewhere_ - (processor_time() - processor_time_);  // of the time in jobs
    behind_ = std::max(behind_ + lost - in_jobs_ / 3, Clock::duration::zero());
    const bool is_calm = behind_ == Clock::duration::zero() && num_helpers_ == num_workers_;
    if (is_calm && ended > try_again_at_) rest_ = kShortestRest;
    if (behind_ > kPatience) {
      num_helpers_ = std::max(num_helpers_ - 1, 0);
      try_again_at_ = ended + rest_;
      rest_ = std::min(2 * rest_, kLongestRest);
      behind_ = kPatience / 2;
    }
    open_window();
  }

 private:
  static constexpr Clock::duration kWindow = milliseconds(1), kPatience = milliseconds(4);
  static constexpr Clock::duration kShortestRest = milliseconds(20), kLongestRest = milliseconds(160);
  static constexpr Clock::duration kLongestGap = microseconds(300);  // within a step; behind it the caller may sleep

  static Clock::duration processor_time() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
  }

  void open_window() {
    caller_ = std::this_thread::get_id();
    processor_time_ = processor_time();
    in_jobs_ = elsewhere_ = Clock::duration::zero();
  }

  int num_workers_, num_helpers_;
  Clock::duration behind_{0}, rest_ = kShortestRest;
  Clock::time_point try_again_at_{}, last_ended_{};

  // Of the window in which time is summed up before it is judged.
  std::thread::id caller_;
  Clock::duration processor_time_{0}, in_jobs_{0}, elsewhere_{0};
};

class alignas(64) Worker {
 public:
  using Take = void (*)(void* pool, int thread);

  Worker(Take take, void* pool, int index) : take_(take), pool_(pool), index_(index), thread_([this] { work(); }) {}
  ~Worker() {
    is_stopping_.store(true);
    wake();
    thread_.join();
  }

  void offer() {
    state_.store(State::kOffered);
    if (is_asleep_.load()) wake();
  }

  // Waits until the worker has left the job; one that has not begun it will not.
  void settle() {
    State expected = State::kOffered;
    // Looks first: writing would take the line away from the worker, who is about to write.
    if (state_.load() == expected && state_.compare_exchange_strong(expected, State::kIdle)) return;
    const auto has_left = [this] { return state_.load() == State::kIdle; };
    if (spin_until(has_left)) return;
    std::unique_lock<std::mutex> lock(lock_);
    is_waited_for_.store(true);
    has_left_.wait(lock, has_left);
    is_waited_for_.store(false);
  }

 private:
  enum class State { kIdle, kOffered, kTaken };

  void wake() {
    const std::lock_guard<std::mutex> lock(lock_);
    has_work_.notify_one();
  }

  void work() {
    const auto has_work = [this] { return state_.load() == State::kOffered || is_stopping_.load(); };
    while (!is_stopping_.load()) {
      if (!spin_until(has_work)) {
        std::unique_lock<std::mutex> lock(lock_);
        is_asleep_.store(true);
        has_work_.wait(lock, has_work);
        is_asleep_.store(false);
      }
      State expected = State::kOffered;
      if (!state_.compare_exchange_strong(expected, State::kTaken)) continue;
      take_(pool_, index_);
      state_.store(State::kIdle);
      if (is_waited_for_.load()) {
        const std::lock_guard<std::mutex> lock(lock_);
        has_left_.notify_one();
      }
    }
  }

  const Take take_;
  void* const pool_;
  const int index_;
  std::atomic<State> state_{State::kIdle};
  std::atomic<bool> is_asleep_{false}, is_waited_for_{false}, is_stopping_{false};
  std::mutex lock_;
  std::condition_variable has_work_, has_left_;
  std::thread thread_;
};

class ThreadPool {
 public:
  explicit ThreadPool(int count) : num_threads_(count) {}

  int num_threads() const { return num_threads_.load(std::memory_order_relaxed); }

  void set_num_threads(int count) {
    const std::lock_guard<std::mutex> only(running_);
    workers_.clear();
    num_threads_ = std::max(count, 1);
  }

  // For the end of the process: later jobs run on their caller alone.
  void retire() { set_num_threads(1); }

  void run(int64_t count, IndexedBody body, void* context) {
    if (count <= 1 || num_threads() == 1) {
      for (int64_t i = 0; i < count; ++i) body(context, i);
      return;
    }
    const std::lock_guard<std::mutex> only(running_);
    start_workers();
    const Clock::time_point begun = Clock::now();
    const int num_helpers = crowding_.num_helpers(begun);
    num_shares_ = num_helpers + 1;
    for (int64_t i = 0; i < num_shares_; ++i) shares_[i].set(count * i / num_shares_, count * (i + 1) / num_shares_);
    body_ = body;
    context_ = context;
    for (int i = 0; i < num_helpers; ++i) workers_[i]->offer();
    take_indices(0);
    const Clock::time_point worked = Clock::now();
    for (int i = 0; i < num_helpers; ++i) workers_[i]->settle();
    const Clock::time_point ended = Clock::now();
    crowding_.judge(begun, ended, std::min(ended - worked, kSpin));
  }

 private:
  // Takes all of a thread's own share, then what is left of the others'.
  void take_indices(int thread) {
    int64_t i;
    while (shares_[thread].take_first(i)) body_(context_, i);
    for (int k = 1; k < num_shares_; ++k) {
      Share& other = shares_[(thread + k) % num_shares_];
      while (other.take_last(i)) body_(context_, i);
    }
  }

  void start_workers() {
    if (!workers_.empty()) return;
    shares_ = std::vector<Share>(num_threads());
    crowding_ = Crowding(num_threads() - 1);
    const Worker::Take take = [](void* pool, int thread) { static_cast<ThreadPool*>(pool)->take_indices(thread); };
    for (int i = 1; i < num_threads(); ++i) workers_.push_back(std::make_unique<Worker>(take, this, i));
  }

  std::mutex running_;  // held by the one caller whose job runs
  std::atomic<int> num_threads_;
  std::vector<std::unique_ptr<Worker>> workers_;
  Crowding crowding_{0};

  // The job.
  std::vector<Share> shares_;  // the caller's, then one for each worker
  int num_shares_ = 0;
  IndexedBody body_ = nullptr;
  void* context_ = nullptr;
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
