// One span of tokens for a few queries: scores, weights and weighted values, and how spans are folded. Used by
// attention.cpp, which says in which order everything is summed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "placement.h"
#include "vector.h"

// Unnamed although a header: there is one user, and functions that nobody else can call are inlined into it.
namespace {

constexpr int64_t kSpan = 128;      // tokens
constexpr int kMaxQueries = 8;      // queries that share the registers
constexpr float kInfinity = std::numeric_limits<float>::infinity();

#if defined(__AVX512F__)
constexpr int kAccumulators = 16;
#elif defined(__AVX2__)
constexpr int kAccumulators = 6;
#else
constexpr int kAccumulators = 4;
#endif

// How many vectors of a second kind fit the registers beside each of `queries`.
constexpr int vectors_beside(int queries) {
  return kAccumulators / queries >= 4 ? 4 : kAccumulators / queries >= 2 ? 2 : 1;
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// What is known of each of Q queries after some spans.
struct State {
  float* largest;  // [Q]
  float* total;    // [Q]: sum of exp(score - largest)
  float* values;   // [Q, padded D]: sum of exp(score - largest) * value
};

State state_at(float* memory, int64_t num_queries) {
  const int64_t padded = round_up(num_queries, kLanes16) + kLanes16;
  return {memory, memory + padded, memory + 2 * padded};
}
int64_t state_size(int64_t num_queries, int64_t padded_dim) {
  return 2 * (round_up(num_queries, kLanes16) + kLanes16) + num_queries * padded_dim;
}

// One span of a sequence for one key/value head, in groups of 16 tokens.
//
// A thread reads the keys of all groups, then the values of all groups, then the next span. While it reads one block of
// this order it fetches the one that comes kAhead later: pages lie anywhere in memory, so the hardware cannot guess it.
class Span {
 public:
  static constexpr int kAhead = 4;
  static constexpr int kMaxGroups = kSpan / kLanes16;

  Span(const Pages& pages, const int32_t* page_ids, int64_t group, int64_t start, int64_t num_tokens)
      : head_dim_(pages.head_dim), page_size_(pages.page_size) {
    const auto end_of = [=](int64_t from) { return std::min(from + kSpan, num_tokens); };
    int num_blocks = 0;
    const auto add = [&](const uint16_t* base, int64_t from, int64_t end, int64_t stride) {
      for (int64_t token = from; token < end; token += kLanes16) {
        const int64_t page = token / page_size_, slot = token - page * page_size_;
        blocks_[num_blocks++] = base + pages.head_at(page_ids[page], group) + slot * stride;
      }
    };
    num_groups_ = static_cast<int>((end_of(start) - start + kLanes16 - 1) / kLanes16);
    add(pages.keys, start, end_of(start), 1);
    add(pages.values, start, end_of(start), head_dim_);
    add(pages.keys, start + kSpan, std::min(start + kSpan + kAhead * kLanes16, num_tokens), 1);
    while (num_blocks < 2 * num_groups_ + kAhead) blocks_[num_blocks++] = blocks_[0];
  }

  int64_t head_dim() const { return head_dim_; }
  int64_t page_size() const { return page_size_; }
  const uint16_t* keys(int group) const { return blocks_[group]; }                  // [D, 16], rows a page size apart
  const uint16_t* values(int group) const { return blocks_[num_groups_ + group]; }  // [16, D]
  const uint16_t* after_keys(int group) const { return blocks_[group + kAhead]; }
  const uint16_t* after_values(int group) const { return blocks_[num_groups_ + group + kAhead]; }

  // For the span that a thread begins with, of which nothing was fetched before.
  void fetch_first_keys() const {
    for (int group = 0; group < std::min(kAhead, num_groups_); ++group)
      for (int64_t i = 0; i < kLanes16 * head_dim_; i += kLine) __builtin_prefetch(keys(group) + i);
  }

  static constexpr int kLine = 32;  // halves

 private:
  int64_t head_dim_, page_size_;
  int num_groups_;
  const uint16_t* blocks_[2 * kMaxGroups + kAhead];
};

// Queries stand in tiles of 8: number d of query i at [8 d + i]. Scores of a query stand kSpan apart.

// scores[q][16 n + lane] for NG groups of tokens.
template <int NQ, int NG>
void score_groups(const float* query, const Span& span, int first_group, bool must_fetch, float* scores) {
  const int64_t stride = span.page_size(), D = span.head_dim();
  const uint16_t *keys[NG], *next[NG];
  F16 sums[NQ][NG];
  for (int n = 0; n < NG; ++n) {
    keys[n] = span.keys(first_group + n);
    next[n] = span.after_keys(first_group + n);
    for (int q = 0; q < NQ; ++q) sums[q][n] = zeros();
  }
  for (int64_t d = 0; d < D; ++d, query += kMaxQueries) {
    if (must_fetch && d % 2 == 0)
      for (int n = 0; n < NG; ++n) __builtin_prefetch(next[n] + d * kLanes16);
    F16 key[NG];
    for (int n = 0; n < NG; ++n) key[n] = load_half(keys[n] + d * stride);
    for (int q = 0; q < NQ; ++q) {
      const F16 factor = splat(query[q]);
      for (int n = 0; n < NG; ++n) sums[q][n] = fma(key[n], factor, sums[q][n]);
    }
  }
  for (int q = 0; q < NQ; ++q)
    for (int n = 0; n < NG; ++n) store(scores + q * kSpan + n * kLanes16, sums[q][n]);
}

// values[q][first_dim ...] += weights[q][t] * value t, for tokens [begin, end) of the span.
template <int NQ, int ND, bool IS_HALF>
void add_values(const float* weights, const Span& span, int64_t begin, int64_t end, int64_t first_dim, bool must_fetch,
                int64_t padded_dim, float* values) {
  const int64_t D = span.head_dim();
  F16 sums[NQ][ND];
  for (int q = 0; q < NQ; ++q)
    for (int n = 0; n < ND; ++n) sums[q][n] = load(values + q * padded_dim + first_dim + n * kLanes16);
  for (int64_t t = begin; t < end;) {
    const int group = static_cast<int>(t / kLanes16);
    const int64_t slot = t % kLanes16, group_end = std::min<int64_t>((group + 1) * kLanes16, end);
    const uint16_t* row = span.values(group) + slot * D + first_dim;
    const uint16_t* next = span.after_values(group) + slot * D + first_dim;
    for (; t < group_end; ++t, row += D, next += D) {
      if (must_fetch)
        for (int n = 0; n < ND; n += 2) __builtin_prefetch(next + n * kLanes16);
      F16 value[ND];
      for (int n = 0; n < ND; ++n) value[n] = IS_HALF ? load_8_halves(row) : load_half(row + n * kLanes16);
      for (int q = 0; q < NQ; ++q) {
        const F16 factor = splat(weights[q * kSpan + t]);
        for (int n = 0; n < ND; ++n) sums[q][n] = fma(value[n], factor, sums[q][n]);
      }
    }
  }
  for (int q = 0; q < NQ; ++q)
    for (int n = 0; n < ND; ++n) store(values + q * padded_dim + first_dim + n * kLanes16, sums[q][n]);
}

template <int NQ>
void add_all_dims(const float* weights, const Span& span, int64_t begin, int64_t end, bool must_fetch,
                  int64_t padded_dim, float* values) {
  constexpr int kWide = vectors_beside(NQ);
  const int64_t whole = span.head_dim() / kLanes16 * kLanes16;
  int64_t d = 0;
  for (; d + kWide * kLanes16 <= whole; d += kWide * kLanes16)
    add_values<NQ, kWide, false>(weights, span, begin, end, d, must_fetch, padded_dim, values);
  for (; d < whole; d += kLanes16)
    add_values<NQ, 1, false>(weights, span, begin, end, d, must_fetch, padded_dim, values);
  if (d < span.head_dim()) add_values<NQ, 1, true>(weights, span, begin, end, d, must_fetch, padded_dim, values);
}

float largest_of(const float* scores, int64_t count) {
  F16 peak = splat(-kInfinity);
  for (int64_t t = 0; t < count; t += kLanes16)
    peak = max(keep_first(load(scores + t), static_cast<int>(count - t), -kInfinity), peak);
  return largest(peak);
}

// Turns the first `count` scores into exp(score - base), up to a whole vector of 16 (zeros behind count); their sum.
float exponentiate(float* scores, int64_t count, float base) {
  F16 sums = zeros();
  for (int64_t t = 0; t < count; t += kLanes16) {
    const F16 weight = keep_first(exp(load(scores + t) - splat(base)), static_cast<int>(count - t), 0.0f);
    store(scores + t, weight);
    sums = sums + weight;
  }
  return sum(sums);
}

// One span for NQ neighbouring queries; counts[q] tokens of it are visible, ascending, at least one. Writes `result`.
template <int NQ>
void take_span(const float* query, const int64_t* counts, const Span& span, bool must_fetch, int64_t padded_dim,
               const State& result) {
  constexpr int kWide = vectors_beside(NQ);
  alignas(64) float scores[NQ * kSpan];
  const int64_t longest = counts[NQ - 1], shortest = counts[0];
  const int num_groups = static_cast<int>((longest + kLanes16 - 1) / kLanes16);

  int group = 0;
  for (; group + kWide <= num_groups; group += kWide)
    score_groups<NQ, kWide>(query, span, group, must_fetch, scores + group * kLanes16);
  for (; group < num_groups; ++group)
    score_groups<NQ, 1>(query, span, group, must_fetch, scores + group * kLanes16);

  for (int q = 0; q < NQ; ++q) result.largest[q] = largest_of(scores + q * kSpan, counts[q]);
  for (int q = 0; q < NQ; ++q) result.total[q] = exponentiate(scores + q * kSpan, counts[q], result.largest[q]);

  std::fill_n(result.values, NQ * padded_dim, 0.0f);
  add_all_dims<NQ>(scores, span, 0, shortest, must_fetch, padded_dim, result.values);
  for (int q = 0; q < NQ; ++q)
    if (counts[q] > shortest)
      add_all_dims<1>(scores + q * kSpan, span, shortest, counts[q], false, padded_dim, result.values + q * padded_dim);
}

using TakeSpan = decltype(&take_span<1>);
constexpr TakeSpan kTakeSpan[kMaxQueries] = {take_span<1>, take_span<2>, take_span<3>, take_span<4>,
                                             take_span<5>, take_span<6>, take_span<7>, take_span<8>};

// state = state joined with the next span, for queries [first, last).
void fold(const State& state, const State& span, int64_t first, int64_t last, int64_t padded_dim) {
  for (int64_t q = first; q < last; q += kLanes16) {
    const F16 before = load(state.largest + q), here = load(span.largest + q), both = max(before, here);
    float keep[kLanes16], take[kLanes16];
    store(keep, exp(before - both));
    store(take, exp(here - both));
    const F16 total = fma(load(span.total + q), load(take), load(state.total + q) * load(keep));
    const int count = static_cast<int>(std::min<int64_t>(kLanes16, last - q));
    store_first(state.largest + q, both, count);
    store_first(state.total + q, total, count);
    for (int i = 0; i < count; ++i) {
      float* const old = state.values + (q + i) * padded_dim;
      const float* const more = span.values + (q + i) * padded_dim;
      for (int64_t d = 0; d < padded_dim; d += kLanes16)
        store(old + d, fma(load(more + d), splat(take[i]), load(old + d) * splat(keep[i])));
    }
  }
}

void begin(const State& state, int64_t num_queries, int64_t padded_dim) {
  std::fill_n(state.largest, num_queries, -kInfinity);
  std::fill_n(state.total, num_queries, 0.0f);
  std::fill_n(state.values, num_queries * padded_dim, 0.0f);
}

}  // namespace
