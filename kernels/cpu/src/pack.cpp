// From a file's rows to blocks of 16 outputs, and back to rows of floats.

#include <algorithm>
#include <cstring>

#include "thread_pool.h"
#include "vector.h"
#include "weight.h"

namespace {

int64_t source_block_bytes(Encoding encoding) {
  switch (encoding) {
    case Encoding::kQ4_0: return 18;
    case Encoding::kQ4_1: return 20;
    case Encoding::kQ8_0: return 34;
    default: return 0;
  }
}

void pack_floats(const uint8_t* row, int64_t num_columns, int64_t element_bytes, int lane, uint8_t* block) {
  for (int64_t k = 0; k < num_columns; ++k)
    std::memcpy(block + (k * kBlock + lane) * element_bytes, row + k * element_bytes, element_bytes);
}

// A source block: fp16 scale, for Q4_1 fp16 minimum, then 16 bytes of nibbles (low ones first) or 32 signed bytes.
void pack_groups(const uint8_t* row, int64_t num_columns, Encoding encoding, int lane, uint8_t* block) {
  for (int64_t g = 0; g < num_columns / kGroup; ++g) {
    const uint8_t* from = row + g * source_block_bytes(encoding);
    uint8_t* to = block + g * stride_of(encoding);
    const int num_lines = encoding == Encoding::kQ8_0 ? 8 : 4;
    std::memcpy(to + 64 * num_lines + 2 * lane, from, 2);
    from += 2;
    if (encoding == Encoding::kQ4_1) {
      std::memcpy(to + 64 * num_lines + 32 + 2 * lane, from, 2);
      from += 2;
    }
    for (int j = 0; j < num_lines; ++j)
      for (int i = 0; i < 4; ++i) {
        const uint8_t value = from[4 * j + i];
        to[64 * j + 4 * lane + i] = encoding == Encoding::kQ8_0 ? value ^ 0x80 : value;
      }
  }
}

void unpack_floats(const uint8_t* block, int64_t num_columns, Encoding encoding, int lane, float* row) {
  for (int64_t k = 0; k < num_columns; ++k) {
    const int64_t at = k * kBlock + lane;
    if (encoding == Encoding::kF32) {
      std::memcpy(row + k, block + 4 * at, 4);
      continue;
    }
    uint16_t bits;
    std::memcpy(&bits, block + 2 * at, 2);
    if (encoding == Encoding::kF16) {
      row[k] = half_to_float(bits);
    } else {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      std::memcpy(row + k, &wide, 4);
    }
  }
}

void unpack_groups(const uint8_t* block, int64_t num_columns, Encoding encoding, int lane, float* row) {
  for (int64_t g = 0; g < num_columns / kGroup; ++g, block += stride_of(encoding), row += kGroup) {
    const uint8_t* const scales = block + (encoding == Encoding::kQ8_0 ? 512 : 256);
    uint16_t bits;
    std::memcpy(&bits, scales + 2 * lane, 2);
    const float d = half_to_float(bits);
    float m = 0.0f;
    if (encoding == Encoding::kQ4_1) {
      std::memcpy(&bits, scales + 32 + 2 * lane, 2);
      m = half_to_float(bits);
    }
    const int offset = encoding == Encoding::kQ8_0 ? 128 : encoding == Encoding::kQ4_0 ? 8 : 0;
    for (int k = 0; k < kGroup; ++k) {
      int value;
      if (encoding == Encoding::kQ8_0) {
        value = block[64 * (k / 4) + 4 * lane + k % 4];
      } else {
        const uint8_t pair = block[64 * (k % 16 / 4) + 4 * lane + k % 4];
        value = k < 16 ? pair & 15 : pair >> 4;
      }
      row[k] = static_cast<float>(value - offset) * d + m;
    }
  }
}

}  // namespace

extern "C" {

int64_t pathfox_packed_bytes(int64_t encoding, int64_t num_rows, int64_t num_columns) {
  return (num_rows + kBlock - 1) / kBlock * block_bytes(static_cast<Encoding>(encoding), num_columns);
}

// Rows of a file to blocks; `to` has pathfox_packed_bytes.
void pathfox_pack(int64_t encoding_number, const uint8_t* from, int64_t num_rows, int64_t num_columns, uint8_t* to) {
  const Encoding encoding = static_cast<Encoding>(encoding_number);
  const int64_t element_bytes = encoding == Encoding::kF32 ? 4 : 2;
  const int64_t row_bytes =
      is_quantised(encoding) ? num_columns / kGroup * source_block_bytes(encoding) : num_columns * element_bytes;
  const int64_t bytes = block_bytes(encoding, num_columns);
  parallel_for((num_rows + kBlock - 1) / kBlock, [=](int64_t index) {
    uint8_t* const block = to + index * bytes;
    const int count = static_cast<int>(std::min<int64_t>(kBlock, num_rows - index * kBlock));
    if (count < kBlock) std::memset(block, 0, bytes);
    for (int lane = 0; lane < count; ++lane) {
      const uint8_t* const row = from + (index * kBlock + lane) * row_bytes;
      if (is_quantised(encoding)) {
        pack_groups(row, num_columns, encoding, lane, block);
      } else {
        pack_floats(row, num_columns, element_bytes, lane, block);
      }
    }
  });
}

// out [R, K] = rows `ids` of the weight. Returns the index of the first id outside the weight, or -1.
int64_t pathfox_embed(const Weight* weight, const int32_t* ids, int64_t num_ids, float* out) {
  for (int64_t i = 0; i < num_ids; ++i)
    if (ids[i] < 0 || ids[i] >= weight->num_rows) return i;
  const int64_t K = weight->num_columns;
  const int64_t ids_per_item = 1 + 4096 / K;
  parallel_for((num_ids + ids_per_item - 1) / ids_per_item, [=](int64_t item) {
    const int64_t end = std::min((item + 1) * ids_per_item, num_ids);
    for (int64_t i = item * ids_per_item; i < end; ++i) {
      const Part* part = weight->parts;
      int64_t row = ids[i];
      for (; row >= part->num_rows; ++part) row -= part->num_rows;
      const uint8_t* const block = part->blocks + row / kBlock * block_bytes(part->encoding, K);
      const int lane = static_cast<int>(row % kBlock);
      if (is_quantised(part->encoding)) {
        unpack_groups(block, K, part->encoding, lane, out + i * K);
      } else {
        unpack_floats(block, K, part->encoding, lane, out + i * K);
      }
    }
  });
  return -1;
}
}
