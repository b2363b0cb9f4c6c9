// Chooses the next token of each row of logits. Same signature and same choices as kernels/sample/reference.py.
//
// Law: a row's bits depend on that row only, and are the same on every instruction set: `exp` is vector.h's, `log` is
// below, and sums are of whole numbers (logits.h).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>

#include "logits.h"
#include "philox.h"
#include "thread_pool.h"

// ---- the interface: plain structs of arrays, as kernels/cpu/sample.py declares them ----

extern "C" {

struct PathfoxRagged {
  const int32_t* offsets;  // [L + 1]
  const int32_t* token_ids;
};

struct PathfoxSamplingRows {
  const float *temperature, *top_p, *min_p, *repetition_penalty, *presence_penalty, *frequency_penalty;
  const int32_t *top_k, *index, *logprobs;
  const int64_t* position;
  const uint64_t* seed;
  PathfoxRagged prompt, output, bias, banned;
  const float* bias_values;
};

struct PathfoxSampledRows {
  int32_t* token_ids;
  float* logprobs;
  int32_t* ranks;
  int32_t* top_token_ids;  // [L, num_top]
  float* top_logprobs;
  int32_t num_top;
};

struct PathfoxSampleCall {
  const float* logits;  // [L, V]
  int32_t num_rows;     // L
  int32_t size;         // V
  PathfoxSamplingRows rows;
  PathfoxSampledRows out;
};

struct PathfoxScoreCall {
  const float* logits;  // [L, V]
  int32_t num_rows;     // L
  int32_t size;         // V
  const int32_t* token_ids;
  int64_t num_top;
  PathfoxSampledRows out;
};
}

namespace sampling {
namespace {

constexpr float kMinTemperature = 1e-5f;

// Natural logarithm of a normal x > 0, by log((1 + s) / (1 - s)) = 2 (s + s^3 / 3 + ...).
double log_of(double x) {
  const uint64_t bits = bits_of<uint64_t>(x);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double m = bits_of<double>((bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  const double s = (m - 1.0) / (m + 1.0), s2 = s * s;
  double sum = 1.0 / 23.0;
  for (int k = 21; k >= 1; k -= 2) sum = sum * s2 + 1.0 / k;
  return exponent * 0.6931471805599453 + 2.0 * s * sum;
}

// ---- one row ----

template <class Visit>
void for_each(const PathfoxRagged& ragged, int r, Visit visit) {
  for (int32_t i = ragged.offsets[r]; i < ragged.offsets[r + 1]; ++i) visit(ragged.token_ids[i], i);
}

bool is_empty(const PathfoxRagged& ragged, int r) { return ragged.offsets[r] == ragged.offsets[r + 1]; }

// Bias, bans and penalties of row r. Returns the row's own logits if it has none, else an edited copy.
const float* edit(const float* logits, int size, const PathfoxSamplingRows& rows, int r, Memory& memory) {
  if (is_empty(rows.prompt, r) && is_empty(rows.output, r) && is_empty(rows.bias, r) && is_empty(rows.banned, r)) {
    return logits;
  }
  memory.edited.assign(logits, logits + size);
  float* x = memory.edited.data();
  for_each(rows.bias, r, [&](int id, int at) { x[id] += rows.bias_values[at]; });
  for_each(rows.banned, r, [&](int id, int) { x[id] = -kInfinity; });

  constexpr int32_t kSeen = 1 << 30;  // above any count; the marks are all 0 before and after
  memory.marks.resize(std::max(memory.marks.size(), static_cast<size_t>(size)));
  int32_t* marks = memory.marks.data();
  for_each(rows.prompt, r, [&](int id, int) { marks[id] |= kSeen; });
  for_each(rows.output, r, [&](int id, int) { marks[id] = (marks[id] | kSeen) + 1; });
  const float repetition = rows.repetition_penalty[r];
  const float frequency = rows.frequency_penalty[r], presence = rows.presence_penalty[r];
  const auto penalise = [&](int id, int) {
    if (marks[id] == 0) return;  // done already
    const int32_t count = marks[id] & ~kSeen;
    marks[id] = 0;
    x[id] = x[id] > 0.0f ? x[id] / repetition : x[id] * repetition;
    x[id] = x[id] - frequency * static_cast<float>(count);
    x[id] = x[id] - presence * (count > 0 ? 1.0f : 0.0f);
  };
  for_each(rows.prompt, r, penalise);
  for_each(rows.output, r, penalise);
  return x;
}

// Draws one of the kept tokens, in id order: first the block, then the token in it.
int draw(const Row& row, const Scale& scale, const Cut& cut, const PathfoxSamplingRows& rows, int r, Memory& memory) {
  const int64_t total = mass_of_row(row, scale, cut, memory);
  if (total == 0) return first_with(row, memory, scale.largest);  // only for parameters out of range
  int64_t threshold = draw_below(total, rows.seed[r], rows.index[r], rows.position[r]);
  int b = 0;
  for (; threshold >= memory.masses[b]; ++b) threshold -= memory.masses[b];
  for (int i = 0;; i += kLanes16) {
    Weights weights[kWeightParts];
    weigh_kept16(row.block(b) + i, b * kBlock + i, scale, cut, weights);
    for (int lane = 0; lane < kLanes16; ++lane) {
      const int64_t weight = weights[lane / kWeightLanes][lane % kWeightLanes];
      if (threshold < weight) return b * kBlock + i + lane;
      threshold -= weight;
    }
  }
}

// A logit whose weight is below `scale.least` by more than exp, log and the subtraction may err.
float logit_below(const Scale& scale) {
  const double share = static_cast<double>(scale.least) / static_cast<double>(kWeightOfOne);
  const double logit = scale.largest + (log_of(share) - 0.01) / scale.inverse_temperature;
  const double lowest = -std::numeric_limits<float>::max();
  return static_cast<float>(std::max(logit - 1e-6 * std::abs(static_cast<double>(scale.largest)), lowest));
}

int choose(const Row& row, float largest, const PathfoxSamplingRows& rows, int r, Memory& memory) {
  const float temperature = rows.temperature[r];
  if (temperature < kMinTemperature) return first_with(row, memory, largest);
  Scale scale{largest, std::max(1.0f / temperature, std::numeric_limits<float>::min())};
  const bool has_top_k = rows.top_k[r] > 0 && rows.top_k[r] < row.size, has_top_p = rows.top_p[r] < 1.0f;
  if (has_top_k) {
    select_top(row, rows.top_k[r], memory);
    if (has_top_p) {
      const int64_t total = mass_of_keys(row, 0, memory.keys.size(), scale, memory);
      keep_nucleus(row, nucleus_target(rows.top_p[r], total), scale, memory);
    }
  } else if (has_top_p) {
    gather_end_of_nucleus(row, rows.top_p[r], scale, memory);
  }
  Cut cut;
  if (has_top_k || has_top_p) {
    cut.last_id = id_of(memory.keys.back());
    cut.logit = row.logits[cut.last_id];
  }
  scale.least = whole(rows.min_p[r] < 1.0f ? rows.min_p[r] : 1.0f);  // not a number: 1
  if (scale.least > 0) scale.least_logit = logit_below(scale);
  return draw(row, scale, cut, rows, r, memory);
}

int rank_of(const Row& row, int token_id, const Memory& memory) {
  const float value = row.logits[token_id];
  int64_t rank = 1;
  for (int b = 0; b < row.num_blocks; ++b) {
    if (!reaches(memory, b, value)) continue;
    const float* block = row.block(b);
    const int num_before = std::clamp(token_id - b * kBlock, 0, kBlock);  // of equal logits the lower ids come first
    const int size = std::min(kBlock, row.size - b * kBlock);
    for (int i = 0; i < num_before; ++i) rank += block[i] >= value;
    for (int i = num_before; i < size; ++i) rank += block[i] > value;
  }
  return static_cast<int>(rank);
}

// Log probability, rank and top tokens of the raw logits. `memory` holds the lane maxima of this row.
void report(const Row& row, float largest, int num_top, PathfoxSampledRows& out, int r, Memory& memory) {
  const int64_t total = mass_of_row(row, Scale{largest}, Cut{}, memory);
  const double log_total = largest + log_of(static_cast<double>(total) / static_cast<double>(kWeightOfOne));
  const int token_id = out.token_ids[r];
  out.logprobs[r] = static_cast<float>(row.logits[token_id] - log_total);
  out.ranks[r] = rank_of(row, token_id, memory);
  num_top = std::min(num_top, out.num_top);
  if (num_top == 0) return;
  select_top(row, num_top, memory);
  std::sort(memory.keys.begin(), memory.keys.end(), std::greater<uint64_t>());
  for (int i = 0; i < num_top; ++i) {
    const int id = id_of(memory.keys[i]);
    out.top_token_ids[size_t{1} * r * out.num_top + i] = id;
    out.top_logprobs[size_t{1} * r * out.num_top + i] = static_cast<float>(row.logits[id] - log_total);
  }
}

void clear(PathfoxSampledRows& out, int r) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  out.logprobs[r] = nan;
  out.ranks[r] = 0;
  std::fill_n(out.top_token_ids + size_t{1} * r * out.num_top, out.num_top, -1);
  std::fill_n(out.top_logprobs + size_t{1} * r * out.num_top, out.num_top, nan);
}

void sample_row(const float* logits, int size, const PathfoxSamplingRows& rows, PathfoxSampledRows& out, int r,
                Memory& memory) {
  clear(out, r);
  out.token_ids[r] = -1;
  const float* edited_logits = edit(logits, size, rows, r, memory);
  const Row edited(edited_logits, size);
  float largest = find_largest(edited, memory);
  if (!has_distribution(largest)) return;
  const int token_id = choose(edited, largest, rows, r, memory);
  const bool is_edited = edited_logits != logits;
  if (!is_edited && rows.logprobs[r] < 0) {
    out.token_ids[r] = token_id;
    return;
  }
  const Row raw(logits, size);
  if (is_edited) largest = find_largest(raw, memory);
  if (!has_distribution(largest)) return;  // a NaN that the edits had covered
  out.token_ids[r] = token_id;
  if (rows.logprobs[r] >= 0) report(raw, largest, rows.logprobs[r], out, r, memory);
}

void score_row(const float* logits, int size, int token_id, int num_top, PathfoxSampledRows& out, int r,
               Memory& memory) {
  clear(out, r);
  out.token_ids[r] = -1;
  const Row row(logits, size);
  const float largest = find_largest(row, memory);
  if (!has_distribution(largest)) return;
  out.token_ids[r] = token_id;
  report(row, largest, num_top, out, r, memory);
}

Memory& memory_of_thread() {
  thread_local Memory memory;
  return memory;
}

}  // namespace
}  // namespace sampling

extern "C" {

void pathfox_sample(const PathfoxSampleCall* call) {
  PathfoxSampledRows out = call->out;
  parallel_for(call->num_rows, [=, &out](int64_t r) {
    const float* const row = call->logits + r * call->size;
    sampling::sample_row(row, call->size, call->rows, out, static_cast<int>(r), sampling::memory_of_thread());
  });
}

void pathfox_score(const PathfoxScoreCall* call) {
  PathfoxSampledRows out = call->out;
  parallel_for(call->num_rows, [=, &out](int64_t r) {
    const float* const row = call->logits + r * call->size;
    sampling::score_row(row, call->size, call->token_ids[r], call->num_top, out, static_cast<int>(r),
                        sampling::memory_of_thread());
  });
}

// For tests against the published vectors.
void pathfox_philox4x32(uint32_t* counter, const uint32_t* key) { sampling::philox4x32(counter, key[0], key[1]); }
}
