// Chooses the next token of each row of logits. Same signature and same choices as kernels/sample/reference.py.
//
// Law: a row's bits depend on that row only, and are the same on every instruction set: `exp` is vector.h's, `log` is
// below, and probabilities are summed as integers, so that the order in which they are summed, gathered or selected
// cannot matter.
//
// A row is read in blocks of 512 logits; the largest of each lane of a block (64 logits) is kept. These 64th parts
// bound the k-th largest logit from below, so that selecting the top k reads only the few blocks that can hold it.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "thread_pool.h"
#include "vector.h"

namespace {

constexpr int kLanes = 8;
constexpr int kBlock = 512;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kMinTemperature = 1e-5f;
constexpr int64_t kWeightOfOne = int64_t{1} << 40;  // of a probability relative to the largest

using F8 = float __attribute__((vector_size(32)));
using I8 = int32_t __attribute__((vector_size(32)));
using F4 = float __attribute__((vector_size(16)));
using D4 = double __attribute__((vector_size(32)));
using L4 = int64_t __attribute__((vector_size(32)));

template <class To, class From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline F8 load8(const float* from) {
  F8 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline F8 splat8(float x) { return F8{} + x; }

inline bool any(I8 mask) {
  const L4 bits = bits_of<L4>(mask);
  return (bits[0] | bits[1] | bits[2] | bits[3]) != 0;
}

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

// ---- a row and its weights ----

struct Row {
  const float* logits;
  int size;
  int num_blocks;
  alignas(32) float tail[kBlock];  // the last, partial block, filled up with -inf

  Row(const float* logits_, int size_) : logits(logits_), size(size_), num_blocks((size_ + kBlock - 1) / kBlock) {
    const int begin = (num_blocks - 1) * kBlock;
    std::fill(tail, tail + kBlock, -kInfinity);
    std::copy(logits + begin, logits + size, tail);
  }
  const float* block(int b) const { return b == num_blocks - 1 ? tail : logits + size_t{kBlock} * b; }
};

// How logits become weights: exp((logit - largest) * inverse_temperature), in units of 2^-40, 0 if below `least`.
struct Scale {
  float largest;
  float inverse_temperature = 1.0f;
  int64_t least = 0;
};

inline L4 whole(F4 x) {
  const D4 rounder = D4{} + 4503599627370496.0;  // 2^52: the mantissa's last bit is worth 1
  const D4 shifted = __builtin_convertvector(x, D4) * static_cast<double>(kWeightOfOne) + rounder;
  return bits_of<L4>(shifted) - bits_of<L4>(rounder);
}

// Weights of 16 logits. Returns their sum, in four parts.
inline L4 weigh16(F16 x, const Scale& scale, L4 weights[4]) {
  F4 parts[4];
  store(reinterpret_cast<float*>(parts), exp((x - splat(scale.largest)) * splat(scale.inverse_temperature)));
  L4 sum{};
  for (int i = 0; i < 4; ++i) {
    const L4 weight = whole(parts[i]);
    sum += weights[i] = weight & (weight >= L4{} + scale.least);
  }
  return sum;
}

inline int64_t add_up(L4 sum) { return sum[0] + sum[1] + sum[2] + sum[3]; }

// ---- memory of one thread, kept between calls ----

struct Memory {
  std::vector<float> edited, lane_maxima, sorted_maxima;
  std::vector<int32_t> marks;
  std::vector<uint64_t> keys;
  std::vector<int64_t> masses;
};

// ---- the largest ----

// Fills in the largest logit of each lane of each block. Returns the largest of all; NaN if any logit is NaN.
float find_largest(const Row& row, Memory& memory) {
  memory.lane_maxima.resize(size_t{kLanes} * row.num_blocks);
  I8 is_nan{};
  F8 largest = splat8(-kInfinity);
  for (int b = 0; b < row.num_blocks; ++b) {
    const float* block = row.block(b);
    F8 maxima[4] = {splat8(-kInfinity), splat8(-kInfinity), splat8(-kInfinity), splat8(-kInfinity)};
    for (int i = 0; i < kBlock; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) {
        const F8 x = load8(block + i + j * kLanes);
        is_nan |= x != x;
        maxima[j] = x > maxima[j] ? x : maxima[j];
      }
    }
    for (int j = 1; j < 4; ++j) maxima[0] = maxima[j] > maxima[0] ? maxima[j] : maxima[0];
    std::memcpy(&memory.lane_maxima[size_t{kLanes} * b], maxima, sizeof(F8));
    largest = maxima[0] > largest ? maxima[0] : largest;
  }
  float result = -kInfinity;
  int any_nan = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    result = std::max(result, largest[lane]);
    any_nan |= is_nan[lane];
  }
  return any_nan ? std::numeric_limits<float>::quiet_NaN() : result;
}

bool has_distribution(float largest) { return largest > -kInfinity && largest < kInfinity; }  // false for NaN

bool reaches(const Memory& memory, int block, float bound) {
  return any(load8(&memory.lane_maxima[size_t{kLanes} * block]) >= splat8(bound));
}

int first_with(const Row& row, const Memory& memory, float value) {
  int b = 0;
  while (!reaches(memory, b, value)) ++b;
  return b * kBlock + static_cast<int>(std::find(row.block(b), row.block(b) + kBlock, value) - row.block(b));
}

// ---- selection: keys order tokens by logit, of equal logits the lower id first ----

inline uint64_t key_of(float logit, int id) {
  const int32_t bits = bits_of<int32_t>(logit + 0.0f);  // -0 becomes 0
  const uint32_t sortable = static_cast<uint32_t>(bits) ^ (static_cast<uint32_t>(bits >> 31) | 0x80000000u);
  return (static_cast<uint64_t>(sortable) << 32) | static_cast<uint32_t>(~id);
}

inline int id_of(uint64_t key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

// Keeps the n largest keys, n >= 1, the least of them last.
void keep(std::vector<uint64_t>& keys, size_t n) {
  std::nth_element(keys.begin(), keys.begin() + (n - 1), keys.end(), std::greater<uint64_t>());
  keys.resize(n);
}

// Gathers the keys of at least k tokens (all, if there are no more), the k largest among them.
void gather_top(const Row& row, int k, Memory& memory) {
  float bound = -kInfinity;
  const size_t num_maxima = memory.lane_maxima.size();
  if (static_cast<size_t>(k) <= num_maxima) {  // k lanes hold a logit of at least the k-th largest maximum
    memory.sorted_maxima = memory.lane_maxima;
    const auto kth = memory.sorted_maxima.begin() + (k - 1);
    std::nth_element(memory.sorted_maxima.begin(), kth, memory.sorted_maxima.end(), std::greater<float>());
    bound = *kth;
  }
  memory.keys.clear();
  for (int b = 0; b < row.num_blocks; ++b) {
    if (!reaches(memory, b, bound)) continue;
    const float* block = row.block(b);
    const int begin = b * kBlock, size = std::min(kBlock, row.size - begin);
    for (int i = 0; i < size; ++i) {
      if (block[i] >= bound) memory.keys.push_back(key_of(block[i], begin + i));
    }
  }
}

// Gathers exactly the k largest (all, if there are no more), the least of them last.
void select_top(const Row& row, int k, Memory& memory) {
  gather_top(row, k, memory);
  auto& keys = memory.keys;
  keep(keys, std::min(static_cast<size_t>(k), keys.size()));
}

// Sums the weights of the gathered tokens [begin, end).
int64_t mass_of_keys(const Row& row, size_t begin, size_t end, const Scale& scale, Memory& memory) {
  L4 sum{}, weights[4];
  for (size_t at = begin; at < end; at += kLanes16) {
    const int count = static_cast<int>(std::min(end - at, size_t{kLanes16}));
    float logits[kLanes16];
    std::fill_n(logits, kLanes16, -kInfinity);
    for (int i = 0; i < count; ++i) logits[i] = row.logits[id_of(memory.keys[at + i])];
    sum += weigh16(load(logits), scale, weights);
  }
  return add_up(sum);
}

// Keeps the fewest of the gathered tokens, largest first, whose weights sum to at least `target`; the least of them last.
void keep_nucleus(const Row& row, int64_t target, const Scale& scale, Memory& memory) {
  auto& keys = memory.keys;
  size_t begin = 0, end = keys.size();  // the last token to keep is in [begin, end)
  while (end - begin > 1) {
    const size_t middle = begin + (end - begin) / 2;
    std::nth_element(keys.begin() + begin, keys.begin() + middle, keys.begin() + end, std::greater<uint64_t>());
    const int64_t mass = mass_of_keys(row, begin, middle, scale, memory);
    if (mass >= target) {
      end = middle;
    } else {
      target -= mass;
      begin = middle;
    }
  }
  keep(keys, end);
}

// ---- the generator: Philox4x32-10 ----

void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// floor(total * u), u the random number in [0, 1) of 62 bits that belongs to (seed, index, position).
int64_t draw_below(int64_t total, uint64_t seed, int32_t index, int64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(index), 0, static_cast<uint32_t>(position),
                   static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)};
  philox4x32(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const int64_t high = c[0] >> 1, low = c[1] >> 1;  // 31 bits each; total is below 2^60
  const int64_t total_high = total >> 31, total_low = total & 0x7FFFFFFF;
  return total_high * high + ((total_high * low + total_low * high + ((total_low * low) >> 31)) >> 31);
}

}  // namespace

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
}

namespace {

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

// The least token that is kept; of equal logits the lower ids are.
struct Cut {
  float logit = -kInfinity;
  int last_id = std::numeric_limits<int>::max();
};

// Weights of 16 logits of a row, `id` the first one's; 0 for what is cut.
inline L4 weigh_kept16(const float* logits, int id, const Scale& scale, const Cut& cut, L4 weights[4]) {
  if (cut.logit == -kInfinity) return weigh16(load(logits), scale, weights);
  F8 halves[2];
  I8 any_kept{};
  for (int i = 0; i < 2; ++i) {
    const F8 x = load8(logits + kLanes * i);
    const I8 ids = I8{0, 1, 2, 3, 4, 5, 6, 7} + (id + kLanes * i);
    const I8 is_kept = (x > splat8(cut.logit)) | ((x == splat8(cut.logit)) & (ids <= I8{} + cut.last_id));
    halves[i] = is_kept ? x : splat8(-kInfinity);
    any_kept |= is_kept;
  }
  if (any(any_kept)) return weigh16(load(reinterpret_cast<const float*>(halves)), scale, weights);
  for (int i = 0; i < 4; ++i) weights[i] = L4{};
  return L4{};
}

int64_t mass_of_block(const float* block, int begin, const Scale& scale, const Cut& cut) {
  L4 sum{}, weights[4];
  for (int i = 0; i < kBlock; i += kLanes16) sum += weigh_kept16(block + i, begin + i, scale, cut, weights);
  return add_up(sum);
}

// Sums the weights of the kept tokens; of each block, to memory.masses. Blocks that hold none are not read.
int64_t mass_of_row(const Row& row, const Scale& scale, const Cut& cut, Memory& memory) {
  memory.masses.assign(row.num_blocks, 0);
  int64_t total = 0;
  for (int b = 0; b < row.num_blocks; ++b) {
    if (!reaches(memory, b, cut.logit)) continue;
    total += memory.masses[b] = mass_of_block(row.block(b), b * kBlock, scale, cut);
  }
  return total;
}

// Draws one of the kept tokens, in id order: first the block, then the token in it.
int draw(const Row& row, const Scale& scale, const Cut& cut, const PathfoxSamplingRows& rows, int r, Memory& memory) {
  const int64_t total = mass_of_row(row, scale, cut, memory);
  int64_t threshold = draw_below(total, rows.seed[r], rows.index[r], rows.position[r]);
  int b = 0;
  for (; threshold >= memory.masses[b]; ++b) threshold -= memory.masses[b];
  for (int i = 0;; i += kLanes16) {
    L4 weights[4];
    weigh_kept16(row.block(b) + i, b * kBlock + i, scale, cut, weights);
    for (int lane = 0; lane < kLanes16; ++lane) {
      const int64_t weight = weights[lane / 4][lane % 4];
      if (threshold < weight) return b * kBlock + i + lane;
      threshold -= weight;
    }
  }
}

int64_t nucleus_target(float top_p, int64_t total) {
  const double exact = static_cast<double>(top_p) * static_cast<double>(total);
  const auto floor = static_cast<int64_t>(exact);
  return std::max<int64_t>(1, floor + (static_cast<double>(floor) < exact ? 1 : 0));
}

// Gathers the tokens that hold top_p of the row's mass. 64 are nearly always enough; a flat row needs more.
void gather_nucleus(const Row& row, float top_p, const Scale& scale, Memory& memory) {
  const int64_t target = nucleus_target(top_p, mass_of_row(row, scale, Cut{}, memory));
  for (const int k : {64, 512, kLanes * row.num_blocks, row.size}) {
    gather_top(row, std::min(k, row.size), memory);
    if (mass_of_keys(row, 0, memory.keys.size(), scale, memory) >= target) break;
  }
  keep_nucleus(row, target, scale, memory);
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
    gather_nucleus(row, rows.top_p[r], scale, memory);
  }
  Cut cut;
  if (has_top_k || has_top_p) {
    cut.last_id = id_of(memory.keys.back());
    cut.logit = row.logits[cut.last_id];
  }
  scale.least = whole(F4{} + rows.min_p[r])[0];
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
  num_top = std::min(num_top, row.size);
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

extern "C" {

void pathfox_sample(const float* logits, int32_t num_rows, int32_t size, const PathfoxSamplingRows* rows,
                    PathfoxSampledRows* out) {
  parallel_for(num_rows, [=](int r) {
    sample_row(logits + size_t{1} * r * size, size, *rows, *out, r, memory_of_thread());
  });
}

void pathfox_score(const float* logits, int32_t num_rows, int32_t size, const int32_t* token_ids, int32_t num_top,
                   PathfoxSampledRows* out) {
  parallel_for(num_rows, [=](int r) {
    score_row(logits + size_t{1} * r * size, size, token_ids[r], num_top, *out, r, memory_of_thread());
  });
}

// For tests against the published vectors.
void pathfox_philox4x32(uint32_t* counter, const uint32_t* key) { philox4x32(counter, key[0], key[1]); }
}
