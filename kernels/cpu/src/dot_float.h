// Sixteen outputs times a few rows of floats, for weights that are not quantised.
//
// Even and odd columns are summed apart, each in ascending order, and joined at the end: two chains hide the latency of
// the fused multiply-add, and the order is the same for every tile.
#pragma once

#include "rows.h"
#include "vector.h"
#include "weight.h"

template <Encoding E>
F16 load_column(const uint8_t* from) {
  if constexpr (E == Encoding::kF32) return load(reinterpret_cast<const float*>(from));
  if constexpr (E == Encoding::kF16) return load_half(reinterpret_cast<const uint16_t*>(from));
  if constexpr (E == Encoding::kBF16) return load_bfloat(reinterpret_cast<const uint16_t*>(from));
}

// out[t * kRun + n] = output n of row first_row + t.
template <Encoding E, int ROWS>
void multiply_tile(const uint8_t* block, const PreparedRows& rows, int64_t first_row, float* out) {
  constexpr int64_t kStride = stride_of(E);
  const int64_t K = rows.num_columns;
  const float* x[ROWS];
  F16 even[ROWS], odd[ROWS];
  for (int t = 0; t < ROWS; ++t) {
    x[t] = rows.values + (first_row + t) * K;
    even[t] = odd[t] = zeros();
  }
  int64_t k = 0;
  for (; k + 2 <= K; k += 2, block += 2 * kStride) {
    const F16 first = load_column<E>(block), second = load_column<E>(block + kStride);
    for (int t = 0; t < ROWS; ++t) {
      even[t] = fma(first, splat(x[t][k]), even[t]);
      odd[t] = fma(second, splat(x[t][k + 1]), odd[t]);
    }
  }
  if (k < K) {
    const F16 last = load_column<E>(block);
    for (int t = 0; t < ROWS; ++t) even[t] = fma(last, splat(x[t][k]), even[t]);
  }
  for (int t = 0; t < ROWS; ++t) store(out + kRun * t, even[t] + odd[t]);
}
