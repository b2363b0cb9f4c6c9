// Memory that a thread keeps between calls.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

// Grows to the largest request and stays; contents are not kept when it grows. Use as a `thread_local`.
template <class Value>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(values_); }

  // Room for `count` values, aligned to a cache line, with a cache line of slack behind them.
  Value* reserve(size_t count) {
    if (count <= capacity_) return values_;
    std::free(values_);
    capacity_ = count + count / 2;
    const size_t bytes = (capacity_ * sizeof(Value) / kLine + 2) * kLine;
    values_ = static_cast<Value*>(std::aligned_alloc(kLine, bytes));
    if (values_ == nullptr) throw std::bad_alloc();
    return values_;
  }

 private:
  static constexpr size_t kLine = 64;
  Value* values_ = nullptr;
  size_t capacity_ = 0;
};
