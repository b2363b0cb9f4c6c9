// A packed matrix, as `kernels/cpu/linear.py` describes it.
//
// Outputs are packed in blocks of 16 (one lane each), zero-padded at the end of a part:
//   floats      per column: 16 elements
//   quantised   per group of 32 columns: the quantised numbers, 16 scales (fp16), for Q4_1 also 16 minima (fp16)
//     4 bits    4 x 64 bytes; byte 4 n + i of row j holds columns 4 j + i (low) and 16 + 4 j + i (high) of output n
//     8 bits    8 x 64 bytes; byte 4 n + i of row j holds column 4 j + i of output n, plus 128
#pragma once

#include <cstdint>

constexpr int kBlock = 16;  // outputs of a block
constexpr int kGroup = 32;  // columns that share a scale
constexpr int kRun = 2 * kBlock;  // outputs that a product computes at a time, at most

enum class Encoding : int64_t { kF32, kF16, kBF16, kQ4_0, kQ4_1, kQ8_0 };

constexpr bool is_quantised(Encoding encoding) { return encoding >= Encoding::kQ4_0; }

// Bytes of 16 outputs: per column of floats, per group of quantised columns.
constexpr int64_t stride_of(Encoding encoding) {
  switch (encoding) {
    case Encoding::kF32: return 64;
    case Encoding::kF16:
    case Encoding::kBF16: return 32;
    case Encoding::kQ4_0: return 256 + 32;
    case Encoding::kQ4_1: return 256 + 64;
    case Encoding::kQ8_0: return 512 + 32;
  }
  return 0;
}

constexpr int64_t block_bytes(Encoding encoding, int64_t num_columns) {
  return stride_of(encoding) * (is_quantised(encoding) ? num_columns / kGroup : num_columns);
}

struct Part {
  const uint8_t* blocks;
  int64_t num_rows;
  Encoding encoding;

  int64_t num_blocks() const { return (num_rows + kBlock - 1) / kBlock; }
};

struct Weight {
  int64_t num_rows;
  int64_t num_columns;
  const float* bias;  // null for none
  int64_t num_parts;
  const Part* parts;
};
