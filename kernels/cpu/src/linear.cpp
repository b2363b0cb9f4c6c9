// Products with packed weights: runs of a few blocks of 16 outputs times tiles of rows, shared among threads.

#include <algorithm>

#include "dot_float.h"
#include "dot_int8.h"
#include "rows.h"
#include "thread_pool.h"
#include "vector.h"
#include "weight.h"

namespace {

constexpr int64_t kTilesPerChunk = 12;  // tiles of rows that stay in a thread's cache while it goes through the outputs
constexpr int64_t kChunkRows = kTilesPerChunk * kMaxTile;

// One or two adjacent blocks of a part.
struct Run {
  const Part* part;
  int64_t block;
  int num_blocks;
};

// Tiles [first, last) of the rows.
struct Tiles {
  const PreparedRows& rows;
  int64_t first, last;

  int64_t first_row() const { return rows.first_row(first); }
  int64_t last_row() const { return rows.first_row(last); }
};

// Two blocks multiplied by a tile at once fill the registers. But few rows wait for memory and not for sums, and one
// stream of weights comes faster than two.
constexpr int64_t kFewRows = 4;
constexpr int kRunBlocks = kRun / kBlock;

template <Encoding E, int ROWS, int BLOCKS>
void multiply(const uint8_t* block, const PreparedRows& rows, int64_t row, Ahead& ahead, float* out) {
  if constexpr (is_quantised(E)) {
    dot_tile<E, ROWS, BLOCKS>(block, rows.num_columns / kGroup, rows.quantised(row), ahead, out);
  } else {
    for (int b = 0; b < BLOCKS; ++b, block += block_bytes(E, rows.num_columns))
      multiply_tile<E, ROWS>(block, rows, row, out + b * kBlock);
  }
}

template <Encoding E, int BLOCKS>
void multiply_rows(const uint8_t* block, const PreparedRows& rows, int64_t tile, Ahead& ahead, float* out) {
  const int64_t row = rows.first_row(tile);
  switch (rows.tile_rows(tile)) {
    case 1: return multiply<E, 1, BLOCKS>(block, rows, row, ahead, out);
#if defined(__AVX2__)
    case 2: return multiply<E, 2, BLOCKS>(block, rows, row, ahead, out);
    case 3: return multiply<E, 3, BLOCKS>(block, rows, row, ahead, out);
    case 4: return multiply<E, 4, BLOCKS>(block, rows, row, ahead, out);
#endif
#if defined(__AVX512VNNI__)
    case 5: return multiply<E, 5, BLOCKS>(block, rows, row, ahead, out);
#endif
  }
}

// out[i * kRun + n] = output n of the run, of row i of the tiles.
template <Encoding E>
void multiply_tiles(const Run& run, const Tiles& tiles, float* out) {
  const PreparedRows& rows = tiles.rows;
  const int64_t bytes = block_bytes(E, rows.num_columns), run_bytes = run.num_blocks * bytes;
  const uint8_t* const block = run.part->blocks + run.block * bytes;
  const bool is_pair = run.num_blocks == 2 && rows.num_rows > kFewRows;
  const int64_t num_passes = (is_pair ? kPassesOfPair : run.num_blocks) * (tiles.last - tiles.first);
  const int64_t num_groups = std::max<int64_t>(1, num_passes * (rows.num_columns / kGroup));
  Ahead ahead{block + std::max(run_bytes, kFetchAhead), (run_bytes / 64 + num_groups - 1) / num_groups};
  for (int64_t tile = tiles.first; tile < tiles.last; ++tile) {
    float* const at = out + (rows.first_row(tile) - tiles.first_row()) * kRun;
    if (is_pair) {
      multiply_rows<E, 2>(block, rows, tile, ahead, at);
    } else {
      for (int b = 0; b < run.num_blocks; ++b)
        multiply_rows<E, 1>(block + b * bytes, rows, tile, ahead, at + b * kBlock);
    }
  }
}

void multiply_run(const Run& run, const Tiles& tiles, float* out) {
  switch (run.part->encoding) {
    case Encoding::kF32: return multiply_tiles<Encoding::kF32>(run, tiles, out);
    case Encoding::kF16: return multiply_tiles<Encoding::kF16>(run, tiles, out);
    case Encoding::kBF16: return multiply_tiles<Encoding::kBF16>(run, tiles, out);
    case Encoding::kQ4_0: return multiply_tiles<Encoding::kQ4_0>(run, tiles, out);
    case Encoding::kQ4_1: return multiply_tiles<Encoding::kQ4_1>(run, tiles, out);
    case Encoding::kQ8_0: return multiply_tiles<Encoding::kQ8_0>(run, tiles, out);
  }
}

// Calls body(run, column of its first output, tiles) for all runs of the parts and all tiles.
template <class Body>
void for_runs_and_tiles(const Part* parts, int64_t num_parts, const PreparedRows& rows, Body body) {
  if (rows.num_rows == 0) return;  // a step that only reads prompts selects no row for the head
  int64_t num_runs = 0;
  for (int64_t i = 0; i < num_parts; ++i) num_runs += (parts[i].num_blocks() + kRunBlocks - 1) / kRunBlocks;
  const int64_t num_chunks = (rows.num_tiles() + kTilesPerChunk - 1) / kTilesPerChunk;

  parallel_for(num_chunks * num_runs, [=, &rows](int64_t item) {
    const int64_t chunk = item / num_runs;
    const Tiles tiles{rows, chunk * kTilesPerChunk, std::min((chunk + 1) * kTilesPerChunk, rows.num_tiles())};
    const Part* part = parts;
    int64_t column = 0, block = item % num_runs * kRunBlocks;
    for (;; ++part) {
      const int64_t whole = (part->num_blocks() + kRunBlocks - 1) / kRunBlocks * kRunBlocks;
      if (block < whole) break;
      block -= whole;
      column += part->num_rows;
    }
    const int num_blocks = static_cast<int>(std::min<int64_t>(kRunBlocks, part->num_blocks() - block));
    body(Run{part, block, num_blocks}, column + block * kBlock, tiles);
  });
}

// Calls body(n, count) for the outputs of a run, 16 at a time: those from n on, of which `count` exist.
template <class Body>
void for_blocks(const Run& run, Body body) {
  for (int b = 0; b < run.num_blocks; ++b)
    body(b * kBlock, static_cast<int>(std::min<int64_t>(kBlock, run.part->num_rows - (run.block + b) * kBlock)));
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
  for_runs_and_tiles(weight->parts, weight->num_parts, rows, [=](const Run& run, int64_t column, const Tiles& tiles) {
    alignas(64) float products[kChunkRows * kRun];
    multiply_run(run, tiles, products);
    for_blocks(run, [&](int n, int count) {
      const F16 bias = weight->bias != nullptr ? load_first(weight->bias + column + n, count) : zeros();
      const float* from = products + n;
      for (int64_t row = tiles.first_row(); row < tiles.last_row(); ++row, from += kRun) {
        const int64_t at = row * weight->num_rows + column + n;
        F16 y = load(from);
        if (weight->bias != nullptr) y = y + bias;
        if (residual != nullptr) y = y + load_first(residual + at, count);
        store_first(out + at, y, count);
      }
    });
  });
}

// out = silu(gate norm(x)) * (up norm(x)); the parts of the weight are gate and up. No selection, no residual.
void pathfox_gated_linear(const LinearCall* call) {
  const Part& gate = call->weight->parts[0];
  const Part& up = call->weight->parts[1];
  float* const out = call->out;
  const PreparedRows rows =
      prepare_rows({call->x, nullptr, call->norm, static_cast<float>(call->epsilon)}, call->num_rows, *call->weight);

  for_runs_and_tiles(&gate, 1, rows, [=](const Run& run, int64_t column, const Tiles& tiles) {
    alignas(64) float gates[kChunkRows * kRun], ups[kChunkRows * kRun];
    multiply_run(run, tiles, gates);
    multiply_run({&up, run.block, run.num_blocks}, tiles, ups);
    for_blocks(run, [&](int n, int count) {
      int64_t i = n;
      for (int64_t row = tiles.first_row(); row < tiles.last_row(); ++row, i += kRun)
        store_first(out + row * gate.num_rows + column + n, silu(load(gates + i)) * load(ups + i), count);
    });
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
