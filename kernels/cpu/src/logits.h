// One row of logits: its weights, its largest, and the selection of its top without sorting. Used by sample.cpp.
//
// A row is read in blocks of 512 logits; the largest of each lane of a block (64 logits) is kept. These 64th parts
// bound the k-th largest logit from below, so that selecting the top k reads only the few blocks that can hold it.
// Probabilities are whole numbers: the order in which they are summed, gathered or selected cannot matter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "vector.h"

namespace sampling {

constexpr int kLanes = 8;
constexpr int kBlock = 512;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
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

// Sixteen weights are kept in the widest vectors that the instruction set has.
#if defined(__AVX512DQ__)
constexpr int kWeightLanes = 8;
#else
constexpr int kWeightLanes = 4;
#endif
constexpr int kWeightParts = kLanes16 / kWeightLanes;
using Weights = int64_t __attribute__((vector_size(8 * kWeightLanes)));

inline F8 splat8(float x) { return F8{} + x; }

inline bool any(I8 mask) {
  const L4 bits = bits_of<L4>(mask);
  return (bits[0] | bits[1] | bits[2] | bits[3]) != 0;
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
  float least_logit = -kInfinity;  // no logit below it reaches `least`
};

// Sixteen relative probabilities as whole numbers, halves to even.
inline void whole16(F16 x, Weights weights[kWeightParts]) {
  const F16 scaled = x * splat(static_cast<float>(kWeightOfOne));  // exact: a power of two
#if defined(__AVX512DQ__)
  weights[0] = bits_of<Weights>(_mm512_cvtps_epi64(low_half(scaled)));
  weights[1] = bits_of<Weights>(_mm512_cvtps_epi64(high_half(scaled)));
#else
  const D4 rounder = D4{} + 4503599627370496.0;  // 2^52: the mantissa's last bit is worth 1
  F4 parts[kWeightParts];
  store(reinterpret_cast<float*>(parts), scaled);
  for (int i = 0; i < kWeightParts; ++i)
    weights[i] = bits_of<L4>(__builtin_convertvector(parts[i], D4) + rounder) - bits_of<L4>(rounder);
#endif
}

inline int64_t whole(float x) {
  Weights weights[kWeightParts];
  whole16(splat(x), weights);
  return weights[0][0];
}

// Weights of 16 logits. Returns their sum, in parts.
inline Weights weigh16(F16 x, const Scale& scale, Weights weights[kWeightParts]) {
  whole16(exp((x - splat(scale.largest)) * splat(scale.inverse_temperature)), weights);
  Weights sum{};
  for (int i = 0; i < kWeightParts; ++i) sum += weights[i] &= weights[i] >= Weights{} + scale.least;
  return sum;
}

inline int64_t add_up(const Weights& sum) {
  int64_t total = 0;
  for (int i = 0; i < kWeightLanes; ++i) total += sum[i];
  return total;
}

// ---- memory of one thread, kept between calls ----

struct Memory {
  std::vector<float> edited, lane_maxima, sorted_maxima;
  std::vector<int32_t> marks;
  std::vector<uint64_t> keys;
  std::vector<int64_t> masses;
};

// ---- the largest ----

// Fills in the largest logit of each lane of each block. Returns the largest of all; NaN if any logit is NaN.
inline float find_largest(const Row& row, Memory& memory) {
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

inline bool has_distribution(float largest) { return largest > -kInfinity && largest < kInfinity; }  // false for NaN

inline bool reaches(const Memory& memory, int block, float bound) {
  return any(load8(&memory.lane_maxima[size_t{kLanes} * block]) >= splat8(bound));
}

inline int first_with(const Row& row, const Memory& memory, float value) {
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
inline void keep(std::vector<uint64_t>& keys, size_t n) {
  std::nth_element(keys.begin(), keys.begin() + (n - 1), keys.end(), std::greater<uint64_t>());
  keys.resize(n);
}

// Gathers the keys of at least k tokens (all, if there are no more), the k largest among them.
inline void gather_top(const Row& row, int k, Memory& memory) {
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
inline void select_top(const Row& row, int k, Memory& memory) {
  gather_top(row, k, memory);
  auto& keys = memory.keys;
  keep(keys, std::min(static_cast<size_t>(k), keys.size()));
}

// Sums the weights of the gathered tokens [begin, end).
inline int64_t mass_of_keys(const Row& row, size_t begin, size_t end, const Scale& scale, Memory& memory) {
  Weights sum{}, weights[kWeightParts];
  for (size_t at = begin; at < end; at += kLanes16) {
    const int count = static_cast<int>(std::min(end - at, size_t{kLanes16}));
    float logits[kLanes16];
    std::fill_n(logits, kLanes16, -kInfinity);
    for (int i = 0; i < count; ++i) logits[i] = row.logits[id_of(memory.keys[at + i])];
    sum += weigh16(load(logits), scale, weights);
  }
  return add_up(sum);
}

// Keeps the fewest of the gathered tokens, largest first, whose weights reach `target`; the least of them last.
inline void keep_nucleus(const Row& row, int64_t target, const Scale& scale, Memory& memory) {
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

// The least whole mass that is top_p of the total.
inline int64_t nucleus_target(float top_p, int64_t total) {
  const double exact = static_cast<double>(top_p) * static_cast<double>(total);
  const auto floor = static_cast<int64_t>(exact);
  return std::max<int64_t>(1, floor + (static_cast<double>(floor) < exact ? 1 : 0));
}

// A fine scale of logits: eighths of a factor e below the largest; weights are 0 before it ends.
constexpr int kSteps = 256;

inline I8 steps8(const float* logits, const Scale& scale) {
  const F8 steps = (scale.largest - load8(logits)) * scale.inverse_temperature * 8.0f;
  return __builtin_convertvector(steps < splat8(kSteps - 1) ? steps : splat8(kSteps - 1), I8);
}

// Gathers tokens, the least of them last, such that it is the least token of the row's nucleus of top_p: sums the mass
// of each step, finds the step that the nucleus ends in, and gathers that one alone.
inline void gather_end_of_nucleus(const Row& row, float top_p, const Scale& scale, Memory& memory) {
  int64_t masses[4][kSteps] = {};  // four, so that neighbours in one step do not wait for each other
  Weights sum{};
  for (int b = 0; b < row.num_blocks; ++b) {
    for (int i = 0; i < kBlock; i += kLanes16) {
      const float* logits = row.block(b) + i;
      Weights parts[kWeightParts];
      sum += weigh16(load(logits), scale, parts);
      const I8 halves[2] = {steps8(logits, scale), steps8(logits + kLanes, scale)};
      int64_t weights[kLanes16];  // from memory, lane by lane: cheaper than out of registers
      int32_t steps[kLanes16];
      std::memcpy(weights, parts, sizeof weights);
      std::memcpy(steps, halves, sizeof steps);
      for (int lane = 0; lane < kLanes16; ++lane) masses[lane % 4][steps[lane]] += weights[lane];
    }
  }
  int64_t target = nucleus_target(top_p, add_up(sum));
  int last_step = 0;
  for (;; ++last_step) {
    int64_t mass = 0;
    for (const auto& part : masses) mass += part[last_step];
    if (mass >= target) break;
    target -= mass;
  }
  memory.keys.clear();
  for (int b = 0; b < row.num_blocks; ++b) {
    if (!any(steps8(&memory.lane_maxima[size_t{kLanes} * b], scale) <= I8{} + last_step)) continue;
    const float* block = row.block(b);
    for (int i = 0; i < kBlock; i += kLanes) {
      const I8 is_last = steps8(block + i, scale) == I8{} + last_step;
      if (!any(is_last)) continue;
      for (int lane = 0; lane < kLanes; ++lane) {
        if (is_last[lane]) memory.keys.push_back(key_of(block[i + lane], b * kBlock + i + lane));
      }
    }
  }
  keep_nucleus(row, target, scale, memory);
}

// ---- what is kept of a row ----

// The least token that is kept; of equal logits the lower ids are.
struct Cut {
  float logit = -kInfinity;
  int last_id = std::numeric_limits<int>::max();
};

// Weights of 16 logits of a row, `id` the first one's; 0 for what is cut.
inline Weights weigh_kept16(const float* logits, int id, const Scale& scale, const Cut& cut,
                            Weights weights[kWeightParts]) {
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
  std::fill_n(weights, kWeightParts, Weights{});
  return Weights{};
}

inline int64_t mass_of_block(const float* block, int begin, const Scale& scale, const Cut& cut) {
  Weights sum{}, weights[kWeightParts];
  for (int i = 0; i < kBlock; i += kLanes16) sum += weigh_kept16(block + i, begin + i, scale, cut, weights);
  return add_up(sum);
}

// Sums the weights of the kept tokens; of each block, to memory.masses. Blocks that hold none are not read.
inline int64_t mass_of_row(const Row& row, const Scale& scale, const Cut& cut, Memory& memory) {
  memory.masses.assign(row.num_blocks, 0);
  int64_t total = 0;
  for (int b = 0; b < row.num_blocks; ++b) {
    if (!reaches(memory, b, std::max(cut.logit, scale.least_logit))) continue;
    total += memory.masses[b] = mass_of_block(row.block(b), b * kBlock, scale, cut);
  }
  return total;
}

}  // namespace sampling
