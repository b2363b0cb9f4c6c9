// The rows of a product, made ready once for all outputs: normed, gathered, and quantised where the weight is.
#pragma once

#include <cstdint>

#include "weight.h"

// R rows as 8-bit numbers with one scale per group of 32: x ~ scale * q.
struct QuantisedRows {
  const int8_t* values;       // [R, K]
  const float* scales;        // [R, K / 32]
  const float* scaled_sums;   // [R, K / 32]: scale * sum of q
  const int32_t* sums;        // [R, K / 32]: sum of q
};

struct PreparedRows {
  int64_t num_rows;
  int64_t num_columns;
  const float* values;  // [R, K]; null unless some part is of floats
  QuantisedRows quantised;  // null pointers unless some part is quantised
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
