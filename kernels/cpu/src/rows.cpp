// RMS norm and quantisation of activations.

#include "rows.h"

#include <algorithm>
#include <cstring>

#include "scratch.h"
#include "thread_pool.h"
#include "vector.h"

namespace {

constexpr int64_t kInlineValues = 4096;  // fewer are prepared by the calling thread sooner than by waking others

// Where a group of one row stands in its tile.
struct GroupPlace {
  uint8_t* group;
  int num_rows;  // of the tile
  int row;

  uint8_t* values(int four) const { return group + 4 * (four * num_rows + row); }
  uint8_t* number(int which) const { return values(kGroup / 4 + which); }
};

// Rounds 32 values to multiples of their largest magnitude / 127, halves to even.
void quantise_group(const float* x, GroupPlace to) {
  const F16 first = load(x), second = load(x + kLanes16);
  const float peak = largest(max(magnitude(first), magnitude(second)));
  const F16 inverse = splat(peak > 0.0f ? 127.0f / peak : 0.0f);
  const F16 a = round_even(first * inverse), b = round_even(second * inverse);
  int8_t q[kGroup];
  store_bytes(q, a);
  store_bytes(q + kLanes16, b);
  const float scale = peak / 127.0f, total = sum(a + b), scaled_sum = scale * total;  // small whole numbers: exact
  const int32_t whole_total = static_cast<int32_t>(total);
  for (int i = 0; i < kGroup / 4; ++i) std::memcpy(to.values(i), q + 4 * i, 4);
  std::memcpy(to.number(0), &scale, 4);
  std::memcpy(to.number(1), &scaled_sum, 4);
  std::memcpy(to.number(2), &whole_total, 4);
}

}  // namespace

void norm_row(const float* x, const float* weight, int64_t num_columns, float epsilon, float* y) {
  F16 squares = zeros();
  int64_t k = 0;
  for (; k + kLanes16 <= num_columns; k += kLanes16) {
    const F16 values = load(x + k);
    squares = fma(values, values, squares);
  }
  const int rest = static_cast<int>(num_columns - k);
  if (rest > 0) {
    const F16 values = load_first(x + k, rest);
    squares = fma(values, values, squares);
  }
  const F16 scale = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(num_columns) + epsilon));
  for (k = 0; k + kLanes16 <= num_columns; k += kLanes16) store(y + k, load(x + k) * scale * load(weight + k));
  if (rest > 0) store_first(y + k, load_first(x + k, rest) * scale * load_first(weight + k, rest), rest);
}

PreparedRows prepare_rows(const RowSource& source, int64_t num_rows, const Weight& weight) {
  thread_local Scratch<float> value_memory;
  thread_local Scratch<uint8_t> tile_memory;

  bool has_floats = false, has_quantised = false;
  for (int64_t i = 0; i < weight.num_parts; ++i)
    (is_quantised(weight.parts[i].encoding) ? has_quantised : has_floats) = true;

  const int64_t K = weight.num_columns, G = K / kGroup;
  const bool must_copy = source.norm != nullptr || (has_floats && source.select != nullptr);
  float* const values = must_copy ? value_memory.reserve(num_rows * K) : nullptr;
  uint8_t* const tiles = has_quantised ? tile_memory.reserve(num_rows * G * kGroupBytes) : nullptr;
  const PreparedRows rows{num_rows, K, values != nullptr ? values : source.x, tiles};

  const auto prepare = [=](int64_t row, uint8_t* tile, GroupPlace place) {
    const float* from = source.x + (source.select != nullptr ? source.select[row] : row) * K;
    if (source.norm != nullptr) {
      norm_row(from, source.norm, K, source.epsilon, values + row * K);
      from = values + row * K;
    } else if (values != nullptr) {
      std::memcpy(values + row * K, from, sizeof(float) * K);
    }
    if (tile == nullptr) return;
    for (int64_t g = 0; g < G; ++g) {
      place.group = tile + g * place.num_rows * kGroupBytes;
      quantise_group(from + g * kGroup, place);
    }
  };
  if (must_copy || has_quantised) {
    const int64_t tiles_per_item = 1 + kInlineValues / (K * kMaxTile);
    parallel_for((rows.num_tiles() + tiles_per_item - 1) / tiles_per_item, [=](int64_t item) {
      const int64_t end = std::min((item + 1) * tiles_per_item, rows.num_tiles());
      for (int64_t tile = item * tiles_per_item; tile < end; ++tile) {
        const int64_t first = rows.first_row(tile);
        uint8_t* const at = tiles != nullptr ? tiles + first * G * kGroupBytes : nullptr;
        for (int i = 0; i < rows.tile_rows(tile); ++i) prepare(first + i, at, {at, rows.tile_rows(tile), i});
      }
    });
  }
  return rows;
}
