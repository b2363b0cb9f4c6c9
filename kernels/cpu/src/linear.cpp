// Products with packed weights: blocks of 16 outputs times tiles of rows, shared among threads.

#include <algorithm>

#include "dot_float.h"
#include "dot_int8.h"
#include "rows.h"
#include "thread_pool.h"
#include "vector.h"
#include "weight.h"

namespace {

constexpr int64_t kRowChunk = 64;  // rows that one thread keeps in its cache while it goes through a few blocks

template <Encoding E, int ROWS>
void multiply(const uint8_t* block, const PreparedRows& rows, int64_t first_row, float* tile) {
  if constexpr (is_quantised(E)) {
    dot_tile<E, ROWS>(block, rows, first_row, tile);
  } else {
    multiply_tile<E, ROWS>(block, rows, first_row, tile);
  }
}

// tile[i][n] = output n of row first + i, for first <= first + i < last.
template <Encoding E>
void multiply_rows(const uint8_t* block, const PreparedRows& rows, int64_t first, int64_t last, float* tile) {
  int64_t row = first;
  const auto at = [&] { return tile + (row - first) * kBlock; };
  for (; row + kMaxTile <= last; row += kMaxTile) multiply<E, kMaxTile>(block, rows, row, at());
  if constexpr (kMaxTile > 4) {
    if (row + 4 <= last) {
      multiply<E, 4>(block, rows, row, at());
      row += 4;
    }
  }
  if constexpr (kMaxTile > 2) {
    if (row + 2 <= last) {
      multiply<E, 2>(block, rows, row, at());
      row += 2;
    }
  }
  if (row < last) multiply<E, 1>(block, rows, row, at());
}

void multiply_block(const Part& part, int64_t block, const PreparedRows& rows, int64_t first, int64_t last, float* tile) {
  const uint8_t* at = part.blocks + block * block_bytes(part.encoding, rows.num_columns);
  switch (part.encoding) {
    case Encoding::kF32: return multiply_rows<Encoding::kF32>(at, rows, first, last, tile);
    case Encoding::kF16: return multiply_rows<Encoding::kF16>(at, rows, first, last, tile);
    case Encoding::kBF16: return multiply_rows<Encoding::kBF16>(at, rows, first, last, tile);
    case Encoding::kQ4_0: return multiply_rows<Encoding::kQ4_0>(at, rows, first, last, tile);
    case Encoding::kQ4_1: return multiply_rows<Encoding::kQ4_1>(at, rows, first, last, tile);
    case Encoding::kQ8_0: return multiply_rows<Encoding::kQ8_0>(at, rows, first, last, tile);
  }
}

// Calls body(block, first row, end of rows) for all blocks and rows, in pieces that fit the threads and their caches.
template <class Body>
void for_blocks_and_rows(int64_t num_blocks, int64_t num_rows, Body body) {
  if (num_rows == 0) return;  // a step that only reads prompts selects no row for the head
  const int64_t num_chunks = (num_rows + kRowChunk - 1) / kRowChunk;
  const int64_t wanted_items = std::max<int64_t>(1, 8 * num_threads() / num_chunks);
  const int64_t blocks_per_item = std::clamp<int64_t>(num_blocks / wanted_items, 1, num_chunks > 1 ? 4 : 16);
  const int64_t items_per_chunk = (num_blocks + blocks_per_item - 1) / blocks_per_item;
  parallel_for(num_chunks * items_per_chunk, [=](int64_t item) {
    const int64_t first = item / items_per_chunk * kRowChunk, last = std::min(first + kRowChunk, num_rows);
    const int64_t begin = item % items_per_chunk * blocks_per_item, end = std::min(begin + blocks_per_item, num_blocks);
    for (int64_t block = begin; block < end; ++block) body(block, first, last);
  });
}

}  // namespace

extern "C" {

// Ops that a step calls for every layer take their arguments as one struct, which Python packs sooner than ctypes would
// convert them one by one; see kernels/cpu/linear.py.
struct LinearCall {
  const Weight* weight;
  const float* x;         // [., K]
  int64_t num_rows;       // R; of those selected
  const int32_t* select;  // [R] rows of x; null for all
  const float* norm;      // [K]; null for none
  double epsilon;
  const float* residual;  // [R, N]; null for none
  float* out;             // [R, N]; [R, N / 2] when gated
};

// out = W norm(x) + bias + residual.
void pathfox_linear(const LinearCall* call) {
  const Weight* const weight = call->weight;
  const int64_t num_rows = call->num_rows;
  const float* const residual = call->residual;
  float* const out = call->out;
  const PreparedRows rows =
      prepare_rows({call->x, call->select, call->norm, static_cast<float>(call->epsilon)}, num_rows, *weight);
  int64_t num_blocks = 0;
  for (int64_t i = 0; i < weight->num_parts; ++i) num_blocks += weight->parts[i].num_blocks();

  for_blocks_and_rows(num_blocks, num_rows, [=](int64_t block, int64_t first, int64_t last) {
    const Part* part = weight->parts;
    int64_t column = 0;
    for (; block >= part->num_blocks(); ++part) {
      block -= part->num_blocks();
      column += part->num_rows;
    }
    alignas(64) float tile[kRowChunk * kBlock];
    multiply_block(*part, block, rows, first, last, tile);

    column += block * kBlock;
    const int count = static_cast<int>(std::min<int64_t>(kBlock, part->num_rows - block * kBlock));
    const F16 bias = weight->bias != nullptr ? load_first(weight->bias + column, count) : zeros();
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * weight->num_rows + column;
      F16 y = load(tile + (row - first) * kBlock);
      if (weight->bias != nullptr) y = y + bias;
      if (residual != nullptr) y = y + load_first(residual + at, count);
      store_first(out + at, y, count);
    }
  });
}

// out = silu(gate norm(x)) * (up norm(x)); the parts of the weight are gate and up. No selection, no residual.
void pathfox_gated_linear(const LinearCall* call) {
  const Part& gate = call->weight->parts[0];
  const Part& up = call->weight->parts[1];
  float* const out = call->out;
  const PreparedRows rows =
      prepare_rows({call->x, nullptr, call->norm, static_cast<float>(call->epsilon)}, call->num_rows, *call->weight);

  for_blocks_and_rows(gate.num_blocks(), call->num_rows, [=](int64_t block, int64_t first, int64_t last) {
    alignas(64) float gates[kRowChunk * kBlock], ups[kRowChunk * kBlock];
    multiply_block(gate, block, rows, first, last, gates);
    multiply_block(up, block, rows, first, last, ups);
    const int count = static_cast<int>(std::min<int64_t>(kBlock, gate.num_rows - block * kBlock));
    for (int64_t row = first; row < last; ++row) {
      const F16 y = silu(load(gates + (row - first) * kBlock)) * load(ups + (row - first) * kBlock);
      store_first(out + row * gate.num_rows + block * kBlock, y, count);
    }
  });
}

// y [R, K] = rms_norm(x).
void pathfox_rms_norm(const float* x, int64_t num_rows, int64_t num_columns, const float* weight, float epsilon,
                      float* y) {
  const int64_t rows_per_item = 1 + 4096 / num_columns;
  parallel_for((num_rows + rows_per_item - 1) / rows_per_item, [=](int64_t item) {
    const int64_t end = std::min((item + 1) * rows_per_item, num_rows);
    for (int64_t row = item * rows_per_item; row < end; ++row)
      norm_row(x + row * num_columns, weight, num_columns, epsilon, y + row * num_columns);
  });
}
}
