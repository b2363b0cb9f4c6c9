// One span of tokens for a few queries: scores, weights and weighted values, and how spans are folded. Used by
// attention.cpp, which says in which order everything is summed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <utility>

#include "span.h"
#include "vector.h"

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Queries that share the registers, and how many vectors of sums beside them fit without being spilled.
#if defined(__AVX512F__)
constexpr int kMaxQueries = 8, kAccumulators = 16;
#elif defined(__AVX2__)
constexpr int kMaxQueries = 6, kAccumulators = 5;
#else
constexpr int kMaxQueries = 6, kAccumulators = 4;
#endif

// How many vectors of a second kind fit the registers beside each of `queries`.
constexpr int vectors_beside(int queries) {
  return kAccumulators / queries >= 4 ? 4 : kAccumulators / queries >= 2 ? 2 : 1;
}

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

// Queries stand in blocks of kMaxQueries: number d of query i at [kMaxQueries d + i]. Scores of a query stand kSpan
// apart.

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
  const int64_t stride = span.head_dim();
  F16 sums[NQ][ND];
  for (int q = 0; q < NQ; ++q)
    for (int n = 0; n < ND; ++n) sums[q][n] = load(values + q * padded_dim + first_dim + n * kLanes16);
  for (int64_t t = begin; t < end;) {
    const int group = static_cast<int>(t / kLanes16);
    const int64_t group_end = std::min<int64_t>((group + 1) * kLanes16, end);
    const int64_t at = t % kLanes16 * stride + first_dim;
    const uint16_t *row = span.values(group) + at, *next = span.after_values(group) + at;
    for (; t < group_end; ++t, row += stride, next += stride) {
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
  for (; d < whole; d += kLanes16) add_values<NQ, 1, false>(weights, span, begin, end, d, must_fetch, padded_dim, values);
  if (d < span.head_dim()) add_values<NQ, 1, true>(weights, span, begin, end, d, must_fetch, padded_dim, values);
}

float largest_of(const float* scores, int64_t count) {
  F16 peak = splat(-kInfinity);
  const int64_t whole = count / kLanes16 * kLanes16;
  for (int64_t t = 0; t < whole; t += kLanes16) peak = max(load(scores + t), peak);
  if (whole < count) peak = max(keep_first(load(scores + whole), static_cast<int>(count - whole), -kInfinity), peak);
  return largest(peak);
}

// Turns the first `count` scores into exp(score - base), up to a whole vector of 16 (zeros behind count); their sum.
float exponentiate(float* scores, int64_t count, float base) {
  F16 sums = zeros();
  const F16 bases = splat(base);
  const int64_t whole = count / kLanes16 * kLanes16;
  for (int64_t t = 0; t < whole; t += kLanes16) {
    const F16 weight = exp(load(scores + t) - bases);
    store(scores + t, weight);
    sums = sums + weight;
  }
  if (whole < count) {
    const F16 weight = keep_first(exp(load(scores + whole) - bases), static_cast<int>(count - whole), 0.0f);
    store(scores + whole, weight);
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
  for (; group < num_groups; ++group) score_groups<NQ, 1>(query, span, group, must_fetch, scores + group * kLanes16);

  for (int q = 0; q < NQ; ++q) result.largest[q] = largest_of(scores + q * kSpan, counts[q]);
  for (int q = 0; q < NQ; ++q) result.total[q] = exponentiate(scores + q * kSpan, counts[q], result.largest[q]);

  std::fill_n(result.values, NQ * padded_dim, 0.0f);
  add_all_dims<NQ>(scores, span, 0, shortest, must_fetch, padded_dim, result.values);
  for (int q = 0; q < NQ; ++q)
    if (counts[q] > shortest)
      add_all_dims<1>(scores + q * kSpan, span, shortest, counts[q], false, padded_dim, result.values + q * padded_dim);
}

using TakeSpan = decltype(&take_span<1>);

// The function for each number of queries: [n] takes n + 1.
template <int... N>
constexpr std::array<TakeSpan, sizeof...(N)> take_span_of(std::integer_sequence<int, N...>) {
  return {take_span<N + 1>...};
}
constexpr auto kTakeSpan = take_span_of(std::make_integer_sequence<int, kMaxQueries>());

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
