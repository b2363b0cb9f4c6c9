// RMS norm and quantisation of activations.

#include "rows.h"

#include "scratch.h"
#include "thread_pool.h"
#include "vector.h"

namespace {

constexpr int64_t kInlineValues = 4096;  // fewer are prepared by the calling thread sooner than by waking others

// Rounds 32 values to multiples of their largest magnitude / 127, halves to even.
void quantise_group(const float* x, int8_t* q, float& scale, float& scaled_sum, int32_t& sum_of_q) {
  const F16 first = load(x), second = load(x + kLanes16);
  const float peak = largest(max(magnitude(first), magnitude(second)));
  const F16 inverse = splat(peak > 0.0f ? 127.0f / peak : 0.0f);
  float rounded[kGroup];
  store(rounded, round_even(first * inverse));
  store(rounded + kLanes16, round_even(second * inverse));
  int32_t total = 0;
  for (int i = 0; i < kGroup; ++i) {
    const int32_t value = static_cast<int32_t>(rounded[i]);
    q[i] = static_cast<int8_t>(value);
    total += value;
  }
  scale = peak / 127.0f;
  scaled_sum = scale * static_cast<float>(total);
  sum_of_q = total;
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
  thread_local Scratch<float> value_memory, scale_memory;
  thread_local Scratch<int8_t> quantised_memory;
  thread_local Scratch<int32_t> sum_memory;

  bool has_floats = false, has_quantised = false;
  for (int64_t i = 0; i < weight.num_parts; ++i)
    (is_quantised(weight.parts[i].encoding) ? has_quantised : has_floats) = true;

  const int64_t K = weight.num_columns, G = K / kGroup;
  const bool must_copy = source.norm != nullptr || (has_floats && source.select != nullptr);
  float* const values = must_copy ? value_memory.reserve(num_rows * K) : nullptr;
  int8_t* const q = has_quantised ? quantised_memory.reserve(num_rows * K) : nullptr;
  float* const scales = has_quantised ? scale_memory.reserve(2 * num_rows * G) : nullptr;
  float* const scaled_sums = scales + num_rows * G;
  int32_t* const sums = has_quantised ? sum_memory.reserve(num_rows * G) : nullptr;

  const auto prepare = [=](int64_t row) {
    const float* from = source.x + (source.select != nullptr ? source.select[row] : row) * K;
    if (source.norm != nullptr) {
      norm_row(from, source.norm, K, source.epsilon, values + row * K);
      from = values + row * K;
    } else if (values != nullptr) {
      __builtin_memcpy(values + row * K, from, sizeof(float) * K);
    }
    if (q == nullptr) return;
    for (int64_t g = 0; g < G; ++g) {
      const int64_t at = row * G + g;
      quantise_group(from + g * kGroup, q + row * K + g * kGroup, scales[at], scaled_sums[at], sums[at]);
    }
  };
  if (must_copy || has_quantised) {
    const int64_t rows_per_item = 1 + kInlineValues / K;
    parallel_for((num_rows + rows_per_item - 1) / rows_per_item, [=](int64_t item) {
      const int64_t end = (item + 1) * rows_per_item;
      for (int64_t row = item * rows_per_item; row < end && row < num_rows; ++row) prepare(row);
    });
  }
  return {num_rows, K, values != nullptr ? values : source.x, {q, scales, scaled_sums, sums}};
}
