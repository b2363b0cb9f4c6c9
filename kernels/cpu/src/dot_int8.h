// Sixteen outputs times a few rows of 8-bit activations.
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

inline int32_t four_values(const int8_t* q) {
  int32_t bits;
  std::memcpy(&bits, q, sizeof bits);
  return bits;
}

// For few rows the speed is that of memory: a product fetches weights well before the hardware would.
constexpr int kFetchAhead = 4096;  // bytes

template <Encoding E>
void fetch_ahead(const uint8_t* from) {
  for (int64_t i = 0; i < stride_of(E); i += 64) __builtin_prefetch(from + kFetchAhead + i);
}

#if defined(__AVX512VNNI__)

constexpr int kMaxTile = 8;  // rows of a tile

inline __m512 halves_512(const uint8_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

// tile[t][n] = output n of row first_row + t.
template <Encoding E, int ROWS>
void dot_tile(const uint8_t* block, const PreparedRows& rows, int64_t first_row, float* tile) {
  const int64_t K = rows.num_columns, G = K / kGroup;
  const QuantisedRows& x = rows.quantised;
  const __m512i low_bits = _mm512_set1_epi8(15);
  __m512 f[ROWS];
  const int8_t* q[ROWS];
  for (int t = 0; t < ROWS; ++t) {
    f[t] = _mm512_setzero_ps();
    q[t] = x.values + (first_row + t) * K;
  }
  for (int64_t g = 0; g < G; ++g, block += stride_of(E)) {
    __m512i sums[ROWS];
    for (int t = 0; t < ROWS; ++t)
      sums[t] = kOffset<E> == 0 ? _mm512_setzero_si512() : _mm512_set1_epi32(-kOffset<E> * x.sums[(first_row + t) * G + g]);
    constexpr int kLines = kScalesAt<E> / 64;
    if constexpr (ROWS <= 2) fetch_ahead<E>(block);
    for (int j = 0; j < kLines; ++j) {
      const __m512i packed = _mm512_loadu_si512(block + 64 * j);
      if constexpr (E == Encoding::kQ8_0) {
        for (int t = 0; t < ROWS; ++t)
          sums[t] = _mm512_dpbusd_epi32(sums[t], packed, _mm512_set1_epi32(four_values(q[t] + 32 * g + 4 * j)));
      } else {
        const __m512i low = _mm512_and_si512(packed, low_bits);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low_bits);
        for (int t = 0; t < ROWS; ++t) {
          sums[t] = _mm512_dpbusd_epi32(sums[t], low, _mm512_set1_epi32(four_values(q[t] + 32 * g + 4 * j)));
          sums[t] = _mm512_dpbusd_epi32(sums[t], high, _mm512_set1_epi32(four_values(q[t] + 32 * g + 16 + 4 * j)));
        }
      }
    }
    const __m512 d = halves_512(block + kScalesAt<E>);
    for (int t = 0; t < ROWS; ++t) {
      const __m512 scale = _mm512_mul_ps(d, _mm512_set1_ps(x.scales[(first_row + t) * G + g]));
      f[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[t]), scale, f[t]);
    }
    if constexpr (E == Encoding::kQ4_1) {
      const __m512 m = halves_512(block + kScalesAt<E> + 32);
      for (int t = 0; t < ROWS; ++t)
        f[t] = _mm512_fmadd_ps(m, _mm512_set1_ps(x.scaled_sums[(first_row + t) * G + g]), f[t]);
    }
  }
  for (int t = 0; t < ROWS; ++t) _mm512_storeu_ps(tile + kBlock * t, f[t]);
}

#elif defined(__AVX2__)

constexpr int kMaxTile = 4;

// Eight outputs. Pairs of products are summed in 16 bits: 4-bit numbers leave room for a whole group (8 * 2 * 15 * 127
// = 30480), 8-bit ones are taken as two 4-bit halves.
template <Encoding E, int ROWS>
void dot_half_tile(const uint8_t* block, int half, const PreparedRows& rows, int64_t first_row, float* tile) {
  const int64_t K = rows.num_columns, G = K / kGroup;
  const QuantisedRows& x = rows.quantised;
  const __m256i low_bits = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
  __m256 f[ROWS];
  const int8_t* q[ROWS];
  for (int t = 0; t < ROWS; ++t) {
    f[t] = _mm256_setzero_ps();
    q[t] = x.values + (first_row + t) * K;
  }
  for (int64_t g = 0; g < G; ++g, block += stride_of(E)) {
    __m256i sums[ROWS], high_sums[ROWS];  // 16 bits
    for (int t = 0; t < ROWS; ++t) sums[t] = high_sums[t] = _mm256_setzero_si256();
    constexpr int kLines = kScalesAt<E> / 64;
    if (ROWS <= 2 && half == 0) fetch_ahead<E>(block);
    for (int j = 0; j < kLines; ++j) {
      const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 64 * j + 32 * half));
      const __m256i low = _mm256_and_si256(packed, low_bits);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low_bits);
      for (int t = 0; t < ROWS; ++t) {
        const __m256i a = _mm256_set1_epi32(four_values(q[t] + 32 * g + 4 * j));
        sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(low, a));
        if constexpr (E == Encoding::kQ8_0) {
          high_sums[t] = _mm256_add_epi16(high_sums[t], _mm256_maddubs_epi16(high, a));
        } else {
          const __m256i b = _mm256_set1_epi32(four_values(q[t] + 32 * g + 16 + 4 * j));
          sums[t] = _mm256_add_epi16(sums[t], _mm256_maddubs_epi16(high, b));
        }
      }
    }
    const __m256 d = load_half_8(reinterpret_cast<const uint16_t*>(block + kScalesAt<E> + 16 * half));
    for (int t = 0; t < ROWS; ++t) {
      __m256i total = _mm256_madd_epi16(sums[t], ones);
      if constexpr (E == Encoding::kQ8_0) total = _mm256_add_epi32(total, _mm256_madd_epi16(high_sums[t], sixteens));
      if constexpr (kOffset<E> != 0)
        total = _mm256_add_epi32(total, _mm256_set1_epi32(-kOffset<E> * x.sums[(first_row + t) * G + g]));
      const __m256 scale = _mm256_mul_ps(d, _mm256_set1_ps(x.scales[(first_row + t) * G + g]));
      f[t] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), scale, f[t]);
    }
    if constexpr (E == Encoding::kQ4_1) {
      const __m256 m = load_half_8(reinterpret_cast<const uint16_t*>(block + kScalesAt<E> + 32 + 16 * half));
      for (int t = 0; t < ROWS; ++t)
        f[t] = _mm256_fmadd_ps(m, _mm256_set1_ps(x.scaled_sums[(first_row + t) * G + g]), f[t]);
    }
  }
  for (int t = 0; t < ROWS; ++t) _mm256_storeu_ps(tile + kBlock * t + 8 * half, f[t]);
}

// tile[t][n] = output n of row first_row + t.
template <Encoding E, int ROWS>
void dot_tile(const uint8_t* block, const PreparedRows& rows, int64_t first_row, float* tile) {
  dot_half_tile<E, ROWS>(block, 0, rows, first_row, tile);
  dot_half_tile<E, ROWS>(block, 1, rows, first_row, tile);
}

#else

constexpr int kMaxTile = 1;

// tile[0][n] = output n of row first_row.
template <Encoding E, int ROWS>
void dot_tile(const uint8_t* block, const PreparedRows& rows, int64_t first_row, float* tile) {
  static_assert(ROWS == 1);
  const int64_t K = rows.num_columns, G = K / kGroup;
  const int8_t* q = rows.quantised.values + first_row * K;
  F16 f = zeros();
  for (int64_t g = 0; g < G; ++g, block += stride_of(E), q += kGroup) {
    float totals[kBlock];
    for (int n = 0; n < kBlock; ++n) {
      int32_t total = -kOffset<E> * rows.quantised.sums[first_row * G + g];
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
    f = fma(load(totals), d * splat(rows.quantised.scales[first_row * G + g]), f);
    if constexpr (E == Encoding::kQ4_1) {
      const F16 m = load_half(reinterpret_cast<const uint16_t*>(block + kScalesAt<E> + 32));
      f = fma(m, splat(rows.quantised.scaled_sums[first_row * G + g]), f);
    }
  }
  store(tile, f);
}

#endif
