// A few blocks of sixteen outputs times a tile of rows of 8-bit activations.
//
// Within a group of 32 columns products are summed as integers, exactly; groups are joined in ascending order by fused
// multiply-adds. So a result does not depend on the tile a row falls into, and is the same on every instruction set:
//   f = fma(float(sum), d * s, f);  Q4_1 then  f = fma(m, s * sum of q, f)
// Packed numbers are unsigned; Q4_0 and Q8_0 subtract their offset times the sum of q.
#pragma once

#include <cstring>

#include "rows.h"
#include "vector.h"
#include "weight.h"

template <Encoding E>
constexpr int kOffset = E == Encoding::kQ4_0 ? 8 : E == Encoding::kQ8_0 ? 128 : 0;

// Where the scales of a group stand.
template <Encoding E>
constexpr int kScalesAt = E == Encoding::kQ8_0 ? 512 : 256;

template <class Number>
Number number_at(const uint8_t* from) {
  Number number;
  std::memcpy(&number, from, sizeof number);
  return number;
}

// The numbers of one group in a tile of ROWS rows; see PreparedRows.
template <int ROWS>
struct TileGroup {
  const uint8_t* at;

  int32_t four_values(int j, int t) const { return number_at<int32_t>(at + 4 * (ROWS * j + t)); }
  float scale(int t) const { return number_at<float>(at + 4 * (ROWS * kGroup / 4 + t)); }
  float scaled_sum(int t) const { return number_at<float>(at + 4 * (ROWS * (kGroup / 4 + 1) + t)); }
  int32_t sum(int t) const { return number_at<int32_t>(at + 4 * (ROWS * (kGroup / 4 + 2) + t)); }
};

// Weights that are wanted soon, those of the next run. A product asks for a few lines with every group, well before the
// hardware would and across the end of a block, so that memory is never idle.
constexpr int64_t kFetchAhead = 8192;  // bytes, at least

struct Ahead {
  const uint8_t* at;
  int64_t lines_per_group;

  void fetch() {
    for (int64_t i = 0; i < lines_per_group; ++i, at += 64) __builtin_prefetch(at);
  }
};

#if defined(__AVX512VNNI__)

constexpr int kPassesOfPair = 1;  // over the groups of a tile, for two blocks

inline __m512 halves_512(const uint8_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// out[t * kRun + n] = output n of row t, for BLOCKS adjacent blocks.
template <Encoding E, int ROWS, int BLOCKS>
void dot_tile(const uint8_t* block, int64_t num_groups, const uint8_t* rows, Ahead& ahead, float* out) {
  const int64_t next_block = num_groups * stride_of(E);
  const __m512i low_bits = _mm512_set1_epi8(15);
  __m512 f[ROWS][BLOCKS];
  for (int t = 0; t < ROWS; ++t)
    for (int b = 0; b < BLOCKS; ++b) f[t][b] = _mm512_setzero_ps();
  for (int64_t g = 0; g < num_groups; ++g, block += stride_of(E), rows += ROWS * kGroupBytes) {
    const TileGroup<ROWS> x{rows};
    ahead.fetch();
    __m512i sums[ROWS][BLOCKS];
    for (int t = 0; t < ROWS; ++t)
      for (int b = 0; b < BLOCKS; ++b)
        sums[t][b] = kOffset<E> == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(-kOffset<E> * x.sum(t));
    for (int j = 0; j < kScalesAt<E> / 64; ++j) {
      __m512i packed[BLOCKS], high[BLOCKS];
      for (int b = 0; b < BLOCKS; ++b) {
        packed[b] = _mm512_loadu_si512(block + b * next_block + 64 * j);
        if constexpr (E == Encoding::kQ8_0) continue;
        high[b] = _mm512_and_si512(_mm512_srli_epi16(packed[b], 4), low_bits);
        packed[b] = _mm512_and_si512(packed[b], low_bits);
      }
      for (int t = 0; t < ROWS; ++t) {
        const __m512i four = _mm512_set1_epi32(x.four_values(j, t));
        for (int b = 0; b < BLOCKS; ++b) sums[t][b] = _mm512_dpbusd_epi32(sums[t][b], packed[b], four);
      }
      if constexpr (E == Encoding::kQ8_0) continue;
      for (int t = 0; t < ROWS; ++t) {
        const __m512i four = _mm512_set1_epi32(x.four_values(4 + j, t));
        for (int b = 0; b < BLOCKS; ++b) sums[t][b] = _mm512_dpbusd_epi32(sums[t][b], high[b], four);
      }
    }
    for (int b = 0; b < BLOCKS; ++b) {
      const __m512 d = halves_512(block + b * next_block + kScalesAt<E>);
      for (int t = 0; t < ROWS; ++t) {
        const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(x.scale(t)));
        f[t][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t][b]), scale, f[t][b]);
      }
      if constexpr (E == Encoding::kQ4_1) {
        const __m512 m = halves_512(block + b * next_block + kScalesAt<E> + 32);
        for (int t = 0; t < ROWS; ++t) f[t][b] = _mm512_fmadd_ps(m, _mm512_set1_ps(x.scaled_sum(t)), f[t][b]);
      }
    }
  }
  for (int t = 0; t < ROWS; ++t)
    for (int b = 0; b < BLOCKS; ++b) _mm512_storeu_ps(out + t * kRun + b * kBlock, f[t][b]);
}

#elif defined(__AVX2__)

constexpr int kPassesOfPair = 2;

// Eight outputs. Pairs of products are summed in 16 bits: 4-bit numbers leave room for a whole group (8 * 2 * 15 * 127
// = 30480), 8-bit ones are taken as two 4-bit halves.
template <Encoding E, int ROWS>
void dot_half_block(const uint8_t* block, int half, int64_t num_groups, const uint8_t* rows, Ahead& ahead, float* out) {
  const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
  __m256 f[ROWS];
  for (int t = 0; t < ROWS; ++t) f[t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < num_groups; ++g, block += stride_of(E), rows += ROWS * kGroupBytes) {
    const TileGroup<ROWS> x{rows};
    if (half == 0) ahead.fetch();
    __m256i sums[ROWS], high_sums[ROWS];  // 16 bits
    for (int t = 0; t < ROWS; ++t) sums[t] = high_sums[t] = _mm256_setzero_si256();
    for (int j = 0; j < kScalesAt<E> / 64; ++j) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 64 * j + 32 * half));
      const __m256i low = _mm256_and_si256(packed, low_bits);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits);
      for (int t = 0; t < ROWS; ++t) {
        const __m256i a = _mm256_set1_epi32(x.four_values(j, t));
        sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(low, a));
        if constexpr (E == Encoding::kQ8_0) {
          high_sums[t] = _mm256_add_epi16(high_sums[t], _mm256_maddubs_epi16(high, a));
        } else {
          const __m256i b = _mm256_set1_epi32(x.four_values(4 + j, t));
          sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(high, b));
        }
      }
    }
    const __m256 d = load_half_8(reinterpret_cast<const uint16_t*>(block + kScalesAt<E> + 16 * half));
    for (int t = 0; t < ROWS; ++t) {
      __m256i total = _mm256_madd_epi16(sums[t], ones);
      if constexpr (E == Encoding::kQ8_0) total = _mm256_add_epi32(total, _mm256_madd_epi16(high_sums[t], sixteens));
      if constexpr (kOffset<E> != 0) total = _mm256_add_epi32(total, _mm256_set1_epi32(-kOffset<E> * x.sum(t)));
      const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(x.scale(t)));
      f[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, f[t]);
    }
    if constexpr (E == Encoding::kQ4_1) {
      const __m256 m = load_half_8(reinterpret_cast<const uint16_t*>(block + kScalesAt<E> + 32 + 16 * half));
      for (int t = 0; t < ROWS; ++t) f[t] = _mm256_fmadd_ps(m, _mm256_set1_ps(x.scaled_sum(t)), f[t]);
    }
  }
  for (int t = 0; t < ROWS; ++t) _mm256_storeu_ps(out + t * kRun + 8 * half, f[t]);
}

// out[t * kRun + n] = output n of row t, for BLOCKS adjacent blocks.
template <Encoding E, int ROWS, int BLOCKS>
void dot_tile(const uint8_t* block, int64_t num_groups, const uint8_t* rows, Ahead& ahead, float* out) {
  for (int b = 0; b < BLOCKS; ++b, block += num_groups * stride_of(E))
    for (int half = 0; half < 2; ++half)
      dot_half_block<E, ROWS>(block, half, num_groups, rows, ahead, out + b * kBlock);
}

#else

constexpr int kPassesOfPair = 2;

// out[n] = output n of the row.
template <Encoding E>
void dot_block(const uint8_t* block, int64_t num_groups, const uint8_t* rows, float* out) {
  F16 f = zeros();
  for (int64_t g = 0; g < num_groups; ++g, block += stride_of(E), rows += kGroupBytes) {
    const TileGroup<1> x{rows};
    const int8_t* const q = reinterpret_cast<const int8_t*>(rows);
    float totals[kBlock];
    for (int n = 0; n < kBlock; ++n) {
      int32_t total = -kOffset<E> * x.sum(0);
      for (int k = 0; k < kGroup; ++k) {
        if constexpr (E == Encoding::kQ8_0) {
          total += block[64 * (k / 4) + 4 * n + k % 4] * q[k];
        } else {
          const uint8_t pair = block[64 * (k % 16 / 4) + 4 * n + k % 4];
          total += (k < 16 ? pair & 15 : pair >> 4) * q[k];
        }
      }
      totals[n] = static_cast<float>(total);
    }
    const F16 d = load_half(reinterpret_cast<const uint16_t*>(block + kScalesAt<E>));
    f = fma(load(totals), d * splat(x.scale(0)), f);
    if constexpr (E == Encoding::kQ4_1) {
      const F16 m = load_half(reinterpret_cast<const uint16_t*>(block + kScalesAt<E> + 32));
      f = fma(m, splat(x.scaled_sum(0)), f);
    }
  }
  store(out, f);
}

// out[n] = output n of the row, for BLOCKS adjacent blocks.
template <Encoding E, int ROWS, int BLOCKS>
void dot_tile(const uint8_t* block, int64_t num_groups, const uint8_t* rows, Ahead&, float* out) {
  static_assert(ROWS == 1);
  for (int b = 0; b < BLOCKS; ++b, block += num_groups * stride_of(E))
    dot_block<E>(block, num_groups, rows, out + b * kBlock);
}

#endif
