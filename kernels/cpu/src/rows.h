// The rows of a product, made ready once for all outputs: normed, gathered, and quantised where the weight is.
#pragma once

#include <cstdint>

#include "weight.h"

// Rows of a tile at most: what a product keeps in registers next to a few blocks of outputs.
#if defined(__AVX512VNNI__)
constexpr int kMaxTile = 5;
#elif defined(__AVX2__)
constexpr int kMaxTile = 4;
#else
constexpr int kMaxTile = 1;
#endif

// Numbers of a group of 32 columns of a quantised row, x ~ scale * q: 32 q, then a scale, scale * sum of q, sum of q.
constexpr int64_t kGroupBytes = kGroup + 3 * 4;

struct PreparedRows {
  int64_t num_rows;
  int64_t num_columns;
  const float* values;  // [R, K]; null unless some part is of floats
  // Tiles of quantised rows, null unless some part is quantised. A tile of T rows holds per group: 8 x [T, 4] q,
  // [T] scales, [T] scaled sums, [T] sums. So a product reads one stream, at offsets that the compiler knows.
  const uint8_t* tiles;

  // Rows are shared out to as few tiles as can hold them, evenly: 8 rows are 4 and 4, not 5 and 3.
  int64_t num_tiles() const { return (num_rows + kMaxTile - 1) / kMaxTile; }
  int64_t first_row(int64_t tile) const { return tile * num_rows / num_tiles(); }
  int tile_rows(int64_t tile) const { return static_cast<int>(first_row(tile + 1) - first_row(tile)); }
  const uint8_t* quantised(int64_t row) const { return tiles + row * (num_columns / kGroup) * kGroupBytes; }
};

// Which rows a product takes, and what is done to them first.
struct RowSource {
  const float* x;         // [., K]
  const int32_t* select;  // null: row i is row i of x
  const float* norm;      // [K] weights of an RMS norm, null for none
  float epsilon;
};

// The result lives in memory of the calling thread until its next call.
PreparedRows prepare_rows(const RowSource& source, int64_t num_rows, const Weight& weight);

// y = x / sqrt(mean(x^2) + epsilon) * weight.
void norm_row(const float* x, const float* weight, int64_t num_columns, float epsilon, float* y);
