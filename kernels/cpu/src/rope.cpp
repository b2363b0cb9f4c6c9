// Rotary positions, and the writing of keys and values to pages.

#include "placement.h"
#include "thread_pool.h"
#include "vector.h"

namespace {

struct Angles {
  const float* cos;  // [W] of one position
  const float* sin;
  int64_t width;
  bool is_interleaved;
};

void rotate(const float* from, const Angles& angles, int64_t head_dim, float* to) {
  const int64_t width = angles.width;
  if (angles.is_interleaved) {
    for (int64_t i = 0; i < width; ++i) {
      const float a = from[2 * i], b = from[2 * i + 1];
      to[2 * i] = a * angles.cos[i] - b * angles.sin[i];
      to[2 * i + 1] = a * angles.sin[i] + b * angles.cos[i];
    }
  } else {
    for (int64_t i = 0; i < width; ++i) {
      const float a = from[i], b = from[width + i];
      to[i] = a * angles.cos[i] - b * angles.sin[i];
      to[width + i] = a * angles.sin[i] + b * angles.cos[i];
    }
  }
  for (int64_t i = 2 * width; i < head_dim; ++i) to[i] = from[i];
}

// Floats to halves, 16 and a last few at a time.
template <class Write>
void for_halves(const float* from, int64_t count, Write write) {
  uint16_t halves[kLanes16];
  for (int64_t i = 0; i < count; i += kLanes16) {
    const int n = static_cast<int>(count - i < kLanes16 ? count - i : kLanes16);
    store_half(halves, load_first(from + i, n));
    for (int j = 0; j < n; ++j) write(i + j, halves[j]);
  }
}

constexpr int64_t kMaxHeadDim = 256;

}  // namespace

extern "C" {

struct RotateAndStoreCall {
  const Placement* rows;
  Pages pages;
  int64_t num_heads;  // H
  const float* qkv;   // [R, (H + 2 G) D]
  const float* cos;   // [T, W]
  const float* sin;   // [T, W]
  int64_t num_positions;  // T
  int64_t width;          // W
  int64_t is_interleaved;
  float* query;  // [R, H, D]
};

// Returns the first row whose position or page lies outside its table or pool (nothing is written then), or -1.
int64_t pathfox_rotate_and_store(const RotateAndStoreCall* call) {
  const Placement* const rows = call->rows;
  const Pages& pages = call->pages;
  const int64_t D = pages.head_dim, B = pages.page_size, G = pages.num_groups, H = call->num_heads;
  for (int64_t row = 0; row < rows->num_rows; ++row) {
    const int64_t position = rows->positions[row], sequence = rows->sequences[row];
    if (position < 0 || position >= call->num_positions || position / B >= rows->max_pages) return row;
    if (sequence < 0 || sequence >= rows->num_sequences) return row;
    const int64_t page = rows->pages_of(row)[position / B];
    if (page < 0 || page >= pages.num_pages) return row;
  }
  const auto place_row = [=](int64_t row) {
    const int64_t position = rows->positions[row];
    const int64_t page = rows->pages_of(row)[position / B], slot = position % B;
    const int64_t at = position * call->width;
    const Angles angles = {call->cos + at, call->sin + at, call->width, call->is_interleaved != 0};
    const float* const heads = call->qkv + row * (H + 2 * G) * D;
    for (int64_t h = 0; h < H; ++h) rotate(heads + h * D, angles, D, call->query + (row * H + h) * D);
    for (int64_t g = 0; g < G; ++g) {
      float turned[kMaxHeadDim];
      rotate(heads + (H + g) * D, angles, D, turned);
      uint16_t* const keys = pages.keys + pages.head_at(page, g) + slot;
      for_halves(turned, D, [=](int64_t d, uint16_t half) { keys[d * B] = half; });
      uint16_t* const values = pages.values + pages.head_at(page, g) + slot * D;
      for_halves(heads + (H + G + g) * D, D, [=](int64_t d, uint16_t half) { values[d] = half; });
    }
  };
  constexpr int64_t kRowsPerItem = 4;
  parallel_for((rows->num_rows + kRowsPerItem - 1) / kRowsPerItem, [=](int64_t item) {
    const int64_t end = (item + 1) * kRowsPerItem;
    for (int64_t row = item * kRowsPerItem; row < end && row < rows->num_rows; ++row) place_row(row);
  });
  return -1;
}
}
