// Attention over pages.
//
// Tokens are taken in spans of 128 from the start of the sequence. For each span a query gets its largest score, the sum
// of its exponentials and the weighted values; spans are folded into the query's state in order. Within a span keys are
// summed over D in ascending order, exponentials by lane and then by tree, values over tokens in ascending order. So a
// row's bits depend on its query and its tokens only: neither on which rows share its tile, nor on whether the spans of
// a long sequence were taken by one thread or by several.
//
// A tile is a few rows of one sequence for one key/value head: its pages are read once for all of them.

#include <algorithm>
#include <limits>

#include "placement.h"
#include "scratch.h"
#include "thread_pool.h"
#include "vector.h"

namespace {

constexpr int64_t kSpan = 128;      // tokens
constexpr int64_t kTileQueries = 48;  // about as many queries (rows times heads of a group) as a tile has
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

struct Problem {
  const float* query;  // [R, H, D]
  Pages pages;
  Placement rows;
  int64_t num_heads;
  float scale;
  float* out;  // [R, H, D]

  int64_t heads_per_group() const { return num_heads / pages.num_groups; }
  int64_t padded_dim() const { return round_up(pages.head_dim, kLanes16); }
};

struct Tile {
  int64_t first_row;
  int64_t num_rows;
};

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

void prefetch(const uint16_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 32) __builtin_prefetch(from + i);
}

// The 16 tokens that start at `token`, for one key/value head.
struct TokenGroup {
  const uint16_t* keys;    // [D, 16], rows a page size apart
  const uint16_t* values;  // [16, D]
};

class SpanOfPages {
 public:
  SpanOfPages(const Problem& problem, const int32_t* page_ids, int64_t group)
      : pages_(problem.pages), page_ids_(page_ids), group_(group) {}

  TokenGroup at(int64_t token) const {
    const int64_t head = pages_.head_at(page_ids_[token / pages_.page_size], group_);
    const int64_t slot = token % pages_.page_size;
    return {pages_.keys + head + slot, pages_.values + head + slot * pages_.head_dim};
  }

  // With pages of 16 tokens the keys of a group are one run of memory; with others the prefetch covers a part of them.
  void prefetch_keys(int64_t token) const { prefetch(at(token).keys, kLanes16 * pages_.head_dim); }
  void prefetch_values(int64_t token) const { prefetch(at(token).values, kLanes16 * pages_.head_dim); }

  const Pages& pages() const { return pages_; }

 private:
  const Pages& pages_;
  const int32_t* page_ids_;
  int64_t group_;
};

// scores[q][16 n + lane] for NG groups of tokens.
template <int NQ, int NG>
void score_groups(const float* query, const TokenGroup* groups, int64_t head_dim, int64_t page_size, float* scores) {
  F16 sums[NQ][NG];
  for (int q = 0; q < NQ; ++q)
    for (int n = 0; n < NG; ++n) sums[q][n] = zeros();
  for (int64_t d = 0; d < head_dim; ++d) {
    F16 keys[NG];
    for (int n = 0; n < NG; ++n) keys[n] = load_half(groups[n].keys + d * page_size);
    for (int q = 0; q < NQ; ++q) {
      const F16 factor = splat(query[q * head_dim + d]);
      for (int n = 0; n < NG; ++n) sums[q][n] = fma(keys[n], factor, sums[q][n]);
    }
  }
  for (int q = 0; q < NQ; ++q)
    for (int n = 0; n < NG; ++n) store(scores + q * kSpan + n * kLanes16, sums[q][n]);
}

// values[q][first_dim ...] += weights[q][t] * value t, for tokens [begin, end) of the span.
template <int NQ, int ND, bool IS_HALF>
void add_values(const float* weights, const SpanOfPages& span, int64_t span_start, int64_t begin, int64_t end,
                int64_t first_dim, int64_t padded_dim, float* values) {
  const int64_t D = span.pages().head_dim;
  F16 sums[NQ][ND];
  for (int q = 0; q < NQ; ++q)
    for (int n = 0; n < ND; ++n) sums[q][n] = load(values + q * padded_dim + first_dim + n * kLanes16);
  for (int64_t t = begin; t < end;) {
    const int64_t group_start = t / kLanes16 * kLanes16, group_end = std::min(group_start + kLanes16, end);
    const uint16_t* row = span.at(span_start + group_start).values + (t - group_start) * D + first_dim;
    for (; t < group_end; ++t, row += D) {
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
void add_all_dims(const float* weights, const SpanOfPages& span, int64_t span_start, int64_t begin, int64_t end,
                  int64_t padded_dim, float* values) {
  constexpr int kWide = vectors_beside(NQ);
  const int64_t whole = span.pages().head_dim / kLanes16 * kLanes16;
  int64_t d = 0;
  for (; d + kWide * kLanes16 <= whole; d += kWide * kLanes16)
    add_values<NQ, kWide, false>(weights, span, span_start, begin, end, d, padded_dim, values);
  for (; d < whole; d += kLanes16)
    add_values<NQ, 1, false>(weights, span, span_start, begin, end, d, padded_dim, values);
  if (d < span.pages().head_dim)
    add_values<NQ, 1, true>(weights, span, span_start, begin, end, d, padded_dim, values);
}

// Turns the first `count` scores into exp(score - largest), up to a whole vector of 16 (zeros behind count).
void exponentiate(float* scores, int64_t count, float& largest_score, float& total) {
  F16 peak = splat(-kInfinity);
  for (int64_t t = 0; t < count; t += kLanes16) {
    const F16 masked = keep_first(load(scores + t), static_cast<int>(count - t), -kInfinity);
    peak = max(masked, peak);
  }
  largest_score = largest(peak);
  const F16 base = splat(largest_score);
  F16 sums = zeros();
  for (int64_t t = 0; t < count; t += kLanes16) {
    const F16 weight = keep_first(exp(load(scores + t) - base), static_cast<int>(count - t), 0.0f);
    store(scores + t, weight);
    sums = sums + weight;
  }
  total = sum(sums);
}

// One span for NQ neighbouring queries; counts[q] tokens of it are visible, ascending, at least one. Writes `result`.
template <int NQ>
void take_span(const float* query, const int64_t* counts, const SpanOfPages& span, int64_t span_start, bool must_prefetch,
               int64_t padded_dim, const State& result) {
  alignas(64) float scores[NQ * kSpan];
  const Pages& pages = span.pages();
  const int64_t longest = counts[NQ - 1], shortest = counts[0];

  constexpr int kWide = vectors_beside(NQ);
  for (int64_t t = 0; t < longest;) {
    TokenGroup groups[kWide];
    const int num_groups = t + kWide * kLanes16 <= round_up(longest, kLanes16) ? kWide : 1;
    for (int n = 0; n < num_groups; ++n) {
      groups[n] = span.at(span_start + t + n * kLanes16);
      if (must_prefetch) span.prefetch_values(span_start + t + n * kLanes16);
    }
    if (num_groups == kWide) {
      score_groups<NQ, kWide>(query, groups, pages.head_dim, pages.page_size, scores + t);
    } else {
      score_groups<NQ, 1>(query, groups, pages.head_dim, pages.page_size, scores + t);
    }
    t += num_groups * kLanes16;
  }
  for (int q = 0; q < NQ; ++q) {
    exponentiate(scores + q * kSpan, counts[q], result.largest[q], result.total[q]);
    for (int64_t d = 0; d < padded_dim; d += kLanes16) store(result.values + q * padded_dim + d, zeros());
  }
  add_all_dims<NQ>(scores, span, span_start, 0, shortest, padded_dim, result.values);
  for (int q = 0; q < NQ; ++q)
    if (counts[q] > shortest)
      add_all_dims<1>(scores + q * kSpan, span, span_start, shortest, counts[q], padded_dim,
                      result.values + q * padded_dim);
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

// One tile for one key/value head.
class TileHead {
 public:
  TileHead(const Problem& problem, const Tile& tile, int64_t group)
      : problem_(problem), tile_(tile), group_(group), span_(problem, problem.rows.pages_of(tile.first_row), group) {}

  int64_t num_queries() const { return tile_.num_rows * problem_.heads_per_group(); }
  int64_t num_tokens() const { return problem_.rows.positions[tile_.first_row + tile_.num_rows - 1] + 1; }
  int64_t num_spans() const { return (num_tokens() + kSpan - 1) / kSpan; }

  // Queries of the tile, scaled: [num_queries, D].
  void gather_queries(float* to) const {
    const int64_t D = problem_.pages.head_dim, M = problem_.heads_per_group();
    for (int64_t q = 0; q < num_queries(); ++q) {
      const float* from = problem_.query + query_index(q, M) * D;
      for (int64_t d = 0; d < D; ++d) to[q * D + d] = from[d] * problem_.scale;
    }
  }

  // Tokens of a span that a query sees.
  int64_t num_visible(int64_t query, int64_t span) const {
    const int64_t row = tile_.first_row + query / problem_.heads_per_group();
    return std::clamp<int64_t>(problem_.rows.positions[row] + 1 - span * kSpan, 0, kSpan);
  }

  // The first query that sees any token of a span; all later ones do, too.
  int64_t first_query(int64_t span) const {
    int64_t query = 0;
    while (num_visible(query, span) == 0) ++query;
    return query;
  }

  // The result of one span for every query that sees any of it.
  void take(int64_t index, const float* queries, const State& result) const {
    const int64_t start = index * kSpan, Q = num_queries(), first = first_query(index);
    for (int64_t q = first; q < Q;) {
      const int64_t count = std::min<int64_t>(kMaxQueries, Q - q);
      int64_t counts[kMaxQueries];
      for (int64_t i = 0; i < count; ++i) counts[i] = num_visible(q + i, index);
      const State part = {result.largest + q, result.total + q, result.values + q * problem_.padded_dim()};
      kTakeSpan[count - 1](queries + q * problem_.pages.head_dim, counts, span_, start, q == first,
                           problem_.padded_dim(), part);
      if (q == first && index + 1 < num_spans()) prefetch_keys(start + kSpan);
      q += count;
    }
  }

  void finish(const State& state) const {
    const int64_t D = problem_.pages.head_dim, M = problem_.heads_per_group();
    for (int64_t q = 0; q < num_queries(); ++q) {
      const F16 inverse = splat(1.0f / state.total[q]);
      float* const to = problem_.out + query_index(q, M) * D;
      const float* const from = state.values + q * problem_.padded_dim();
      for (int64_t d = 0; d < D; d += kLanes16)
        store_first(to + d, load(from + d) * inverse, static_cast<int>(std::min<int64_t>(kLanes16, D - d)));
    }
  }

  void prefetch_keys(int64_t token) const {
    for (const int64_t end = std::min(token + kSpan, num_tokens()); token < end; token += kLanes16)
      span_.prefetch_keys(token);
  }

 private:
  int64_t query_index(int64_t q, int64_t heads_per_group) const {
    return (tile_.first_row + q / heads_per_group) * problem_.num_heads + group_ * heads_per_group + q % heads_per_group;
  }

  const Problem& problem_;
  const Tile tile_;
  const int64_t group_;
  const SpanOfPages span_;
};

// All spans of a tile on one thread.
void attend(const TileHead& head, const Problem& problem) {
  thread_local Scratch<float> memory;
  const int64_t Q = head.num_queries(), padded = problem.padded_dim(), size = state_size(Q, padded);
  float* const queries = memory.reserve(2 * size + Q * problem.pages.head_dim);
  const State state = state_at(queries + Q * problem.pages.head_dim, Q);
  const State span = state_at(queries + Q * problem.pages.head_dim + size, Q);
  head.prefetch_keys(0);
  head.gather_queries(queries);
  begin(state, Q, padded);
  for (int64_t i = 0; i < head.num_spans(); ++i) {
    head.take(i, queries, span);
    fold(state, span, head.first_query(i), Q, padded);
  }
  head.finish(state);
}

// Few tiles and long sequences: spans are shared among threads, then folded in order.
void attend_by_spans(const Problem& problem, const Tile* tiles, int64_t num_tiles) {
  thread_local Scratch<float> memory;
  thread_local Scratch<int64_t> offsets_memory;
  const int64_t G = problem.pages.num_groups, num_heads = num_tiles * G, padded = problem.padded_dim();
  int64_t* const first_span = offsets_memory.reserve(2 * (num_heads + 1));
  int64_t* const first_float = first_span + num_heads + 1;
  first_span[0] = first_float[0] = 0;
  for (int64_t i = 0; i < num_heads; ++i) {
    const TileHead head(problem, tiles[i / G], i % G);
    first_span[i + 1] = first_span[i] + head.num_spans();
    first_float[i + 1] = first_float[i] + head.num_spans() * state_size(head.num_queries(), padded);
  }
  float* const results = memory.reserve(first_float[num_heads]);
  const auto result_of = [=](int64_t i, int64_t span, int64_t num_queries) {
    return state_at(results + first_float[i] + span * state_size(num_queries, padded), num_queries);
  };
  parallel_for(first_span[num_heads], [=, &problem](int64_t item) {
    thread_local Scratch<float> query_memory;
    const int64_t i = std::upper_bound(first_span, first_span + num_heads + 1, item) - first_span - 1;
    const TileHead head(problem, tiles[i / G], i % G);
    float* const queries = query_memory.reserve(head.num_queries() * problem.pages.head_dim);
    head.prefetch_keys((item - first_span[i]) * kSpan);
    head.gather_queries(queries);
    head.take(item - first_span[i], queries, result_of(i, item - first_span[i], head.num_queries()));
  });
  parallel_for(num_heads, [=, &problem](int64_t i) {
    thread_local Scratch<float> state_memory;
    const TileHead head(problem, tiles[i / G], i % G);
    const int64_t Q = head.num_queries();
    const State state = state_at(state_memory.reserve(state_size(Q, padded)), Q);
    begin(state, Q, padded);
    for (int64_t span = 0; span < head.num_spans(); ++span)
      fold(state, result_of(i, span, Q), head.first_query(span), Q, padded);
    head.finish(state);
  });
}

}  // namespace

extern "C" {

// out [R, H D]: each row attends to tokens 0 .. position of its sequence.
void pathfox_paged_attention(const float* query, const Placement* rows, uint16_t* key_pages, uint16_t* value_pages,
                             int64_t num_pages, int64_t G, int64_t D, int64_t B, int64_t H, float scale, float* out) {
  thread_local Scratch<Tile> tile_memory;
  const Problem problem = {query, {key_pages, value_pages, num_pages, G, D, B}, *rows, H, scale, out};
  const int64_t R = rows->num_rows;
  const int64_t max_rows = std::max<int64_t>(1, kTileQueries / problem.heads_per_group());

  Tile* const tiles = tile_memory.reserve(R);
  int64_t num_tiles = 0;
  for (int64_t row = 0; row < R; ++row) {
    Tile* const last = tiles + num_tiles - 1;
    const bool joins = num_tiles > 0 && last->num_rows < max_rows && rows->sequences[row] == rows->sequences[row - 1] &&
                       rows->positions[row] > rows->positions[row - 1];
    if (joins) {
      ++last->num_rows;
    } else {
      tiles[num_tiles++] = {row, 1};
    }
  }
  if (num_tiles * G < 3 * num_threads()) return attend_by_spans(problem, tiles, num_tiles);
  parallel_for(num_tiles * G, [&](int64_t item) { attend(TileHead(problem, tiles[item / G], item % G), problem); });
}
}
