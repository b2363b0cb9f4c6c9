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

#include "attention_span.h"
#include "placement.h"
#include "scratch.h"
#include "thread_pool.h"

namespace {

constexpr int64_t kTileQueries = 96;  // about as many queries (rows times heads of a group) as a tile has
constexpr int64_t kRunsPerThread = 4;  // of spans: enough to even out, few enough to fetch ahead

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

// One tile for one key/value head.
class TileHead {
 public:
  TileHead(const Problem& problem, const Tile& tile, int64_t group)
      : problem_(problem), tile_(tile), group_(group), page_ids_(problem.rows.pages_of(tile.first_row)) {}

  int64_t num_queries() const { return tile_.num_rows * problem_.heads_per_group(); }
  int64_t queries_size() const { return round_up(num_queries(), kMaxQueries) * problem_.pages.head_dim; }
  int64_t num_tokens() const { return problem_.rows.positions[tile_.first_row + tile_.num_rows - 1] + 1; }
  int64_t num_spans() const { return (num_tokens() + kSpan - 1) / kSpan; }

  // Queries of the tile, scaled, in blocks of kMaxQueries.
  void gather_queries(float* to) const {
    const int64_t D = problem_.pages.head_dim;
    for (int64_t q = 0; q < num_queries(); ++q) {
      const float* from = problem_.query + query_index(q) * D;
      float* const place = to + q / kMaxQueries * kMaxQueries * D + q % kMaxQueries;
      for (int64_t d = 0; d < D; ++d) place[d * kMaxQueries] = from[d] * problem_.scale;
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

  // The result of one span for every query that sees any of it. A thread takes spans [begin, end) in order.
  void take(int64_t index, int64_t begin, int64_t end, const float* queries, const State& result) const {
    const Span span(problem_.pages, page_ids_, group_, index * kSpan, std::min(end * kSpan, num_tokens()));
    if (index == begin) span.fetch_first_keys();
    const int64_t first = first_query(index), padded = problem_.padded_dim();
    for (int64_t q = first; q < num_queries();) {
      const int64_t block = q / kMaxQueries * kMaxQueries, end_query = std::min(block + kMaxQueries, num_queries());
      int64_t counts[kMaxQueries];
      for (int64_t i = q; i < end_query; ++i) counts[i - q] = num_visible(i, index);
      const State part = {result.largest + q, result.total + q, result.values + q * padded};
      const float* const from = queries + block * span.head_dim() + q - block;
      kTakeSpan[end_query - q - 1](from, counts, span, q == first, padded, part);
      q = end_query;
    }
  }

  void finish(const State& state) const {
    const int64_t D = problem_.pages.head_dim;
    for (int64_t q = 0; q < num_queries(); ++q) {
      const F16 inverse = splat(1.0f / state.total[q]);
      float* const to = problem_.out + query_index(q) * D;
      const float* const from = state.values + q * problem_.padded_dim();
      for (int64_t d = 0; d < D; d += kLanes16)
        store_first(to + d, load(from + d) * inverse, static_cast<int>(std::min<int64_t>(kLanes16, D - d)));
    }
  }

 private:
  int64_t query_index(int64_t q) const {
    const int64_t M = problem_.heads_per_group();
    return (tile_.first_row + q / M) * problem_.num_heads + group_ * M + q % M;
  }

  const Problem& problem_;
  const Tile tile_;
  const int64_t group_;
  const int32_t* const page_ids_;
};

// All spans of a tile on one thread.
void attend(const TileHead& head, const Problem& problem) {
  thread_local Scratch<float> memory;
  const int64_t Q = head.num_queries(), padded = problem.padded_dim(), size = state_size(Q, padded);
  float* const queries = memory.reserve(2 * size + head.queries_size());
  const State state = state_at(queries + head.queries_size(), Q);
  const State span = state_at(queries + head.queries_size() + size, Q);
  head.gather_queries(queries);
  begin(state, Q, padded);
  for (int64_t i = 0; i < head.num_spans(); ++i) {
    head.take(i, 0, head.num_spans(), queries, span);
    fold(state, span, head.first_query(i), Q, padded);
  }
  head.finish(state);
}

// Few tiles and long sequences: runs of spans are shared among threads, then each tile's spans are folded in order.
void attend_by_spans(const Problem& problem, const Tile* tiles, int64_t num_tiles) {
  thread_local Scratch<float> memory;
  thread_local Scratch<int64_t> offsets_memory;
  const int64_t G = problem.pages.num_groups, num_heads = num_tiles * G, padded = problem.padded_dim();
  int64_t num_spans = 0;
  for (int64_t i = 0; i < num_tiles; ++i) num_spans += G * TileHead(problem, tiles[i], 0).num_spans();
  const int64_t run = std::max<int64_t>(1, num_spans / (kRunsPerThread * num_threads()));

  int64_t* const first_run = offsets_memory.reserve(2 * (num_heads + 1));
  int64_t* const first_float = first_run + num_heads + 1;
  first_run[0] = first_float[0] = 0;
  for (int64_t i = 0; i < num_heads; ++i) {
    const TileHead head(problem, tiles[i / G], i % G);
    first_run[i + 1] = first_run[i] + (head.num_spans() + run - 1) / run;
    first_float[i + 1] = first_float[i] + head.num_spans() * state_size(head.num_queries(), padded);
  }
  float* const results = memory.reserve(first_float[num_heads]);
  const auto result_of = [=](int64_t i, int64_t span, int64_t num_queries) {
    return state_at(results + first_float[i] + span * state_size(num_queries, padded), num_queries);
  };
  parallel_for(first_run[num_heads], [=, &problem](int64_t item) {
    thread_local Scratch<float> query_memory;
    const int64_t i = std::upper_bound(first_run, first_run + num_heads + 1, item) - first_run - 1;
    const TileHead head(problem, tiles[i / G], i % G);
    float* const queries = query_memory.reserve(head.queries_size());
    head.gather_queries(queries);
    const int64_t begin = (item - first_run[i]) * run, end = std::min(begin + run, head.num_spans());
    for (int64_t span = begin; span < end; ++span)
      head.take(span, begin, end, queries, result_of(i, span, head.num_queries()));
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

struct PagedAttentionCall {
  const Placement* rows;
  Pages pages;
  int64_t num_heads;   // H
  const float* query;  // [R, H, D]
  double scale;
  float* out;  // [R, H D]
};

// Each row attends to tokens 0 .. position of its sequence.
//
// Nothing is checked here. The caller has run pathfox_rotate_and_store on these rows, which checks the page of each
// row's own token only; the caller must keep the ids of a sequence's earlier pages in the page table valid, too: each
// names a page of the pool that was written.
void pathfox_paged_attention(const PagedAttentionCall* call) {
  thread_local Scratch<Tile> tile_memory;
  const Placement* const rows = call->rows;
  const Problem problem = {call->query,     call->pages,
                           *rows,           call->num_heads,
                           static_cast<float>(call->scale), call->out};
  const int64_t R = rows->num_rows, G = call->pages.num_groups;
  const int64_t max_rows = std::max<int64_t>(1, kTileQueries / problem.heads_per_group());

  Tile* const tiles = tile_memory.reserve(R);
  int64_t num_tiles = 0;
  Tile* last = nullptr;
  for (int64_t row = 0; row < R; ++row) {
    const bool joins = last != nullptr && last->num_rows < max_rows &&
                       rows->sequences[row] == rows->sequences[row - 1] &&
                       rows->positions[row] > rows->positions[row - 1];
    if (joins) {
      ++last->num_rows;
    } else {
      last = tiles + num_tiles++;
      *last = {row, 1};
    }
  }
  if (num_tiles * G < 3 * num_threads()) return attend_by_spans(problem, tiles, num_tiles);
  parallel_for(num_tiles * G, [&](int64_t item) { attend(TileHead(problem, tiles[item / G], item % G), problem); });
}
}
