// One span of a sequence for one key/value head: where its groups of 16 tokens lie, and what to fetch while they are read.
#pragma once

#include <algorithm>
#include <cstdint>

#include "placement.h"
#include "vector.h"

// Unnamed although a header: there is one user, and functions that nobody else can call are inlined into it.
namespace {

constexpr int64_t kSpan = 128;  // tokens
constexpr int kMaxGroups = kSpan / kLanes16;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// A thread reads the keys of all groups, then the values of all groups, then the next span. While it reads one block of
// this order it fetches the one that comes kAhead later: pages lie anywhere in memory, so the hardware cannot guess it.
class Span {
 public:
  static constexpr int kAhead = 4;

  // Tokens [start, start + kSpan) of which the thread reads those below end.
  Span(const Pages& pages, const int32_t* page_ids, int64_t group, int64_t start, int64_t end)
      : head_dim_(pages.head_dim), page_size_(pages.page_size) {
    const int64_t own_end = std::min(start + kSpan, end);
    int num_blocks = 0;
    const auto add = [&](const uint16_t* base, int64_t from, int64_t to, int64_t stride) {
      for (int64_t token = from; token < to; token += kLanes16) {
        const int64_t page = token / page_size_, slot = token - page * page_size_;
        blocks_[num_blocks++] = base + pages.head_at(page_ids[page], group) + slot * stride;
      }
    };
    add(pages.keys, start, own_end, 1);
    num_groups_ = num_blocks;
    add(pages.values, start, own_end, head_dim_);
    add(pages.keys, start + kSpan, std::min(start + kSpan + kAhead * kLanes16, end), 1);
    while (num_blocks < 2 * num_groups_ + kAhead) blocks_[num_blocks++] = blocks_[0];
  }

  int64_t head_dim() const { return head_dim_; }
  int64_t page_size() const { return page_size_; }
  const uint16_t* keys(int group) const { return blocks_[group]; }                  // [D, 16], rows page_size apart
  const uint16_t* values(int group) const { return blocks_[num_groups_ + group]; }  // [16, D]
  const uint16_t* after_keys(int group) const { return blocks_[group + kAhead]; }
  const uint16_t* after_values(int group) const { return blocks_[num_groups_ + group + kAhead]; }

  // For the span that a thread begins with, of which nothing was fetched before.
  void fetch_first_keys() const {
    for (int group = 0; group < std::min(kAhead, num_groups_); ++group)
      for (int64_t d = 0; d < head_dim_; d += 2) __builtin_prefetch(keys(group) + d * kLanes16);
  }

 private:
  int64_t head_dim_, page_size_;
  int num_groups_;
  const uint16_t* blocks_[2 * kMaxGroups + kAhead];
};

}  // namespace
