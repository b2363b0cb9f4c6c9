// Sixteen floats at a time, with the same bits on every instruction set.
//
// Every op of `F16` is one IEEE operation per lane (fma included), and every reduction is a fixed tree over the lanes.
// A kernel written on F16 therefore gives the same result as AVX-512, AVX2 or plain C++; none of them calls libm.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

constexpr int kLanes16 = 16;

#if defined(__AVX512F__)

struct F16 {
  __m512 v;
};

inline F16 splat(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline F16 load_half(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
}
// The first 8 lanes from memory, the others zero.
inline F16 load_8_halves(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}
inline F16 load_bfloat(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store(float* to, F16 x) { _mm512_storeu_ps(to, x.v); }
inline void store_half(uint16_t* to, F16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
}
// Whole numbers in [-128, 127].
inline void store_bytes(int8_t* to, F16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)));
}
inline F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b in every lane (so b where one is not a number).
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 magnitude(F16 x) { return {_mm512_abs_ps(x.v)}; }
inline F16 round_even(F16 x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x * 2^n for whole n in [-126, 127].
inline F16 scale_by_power(F16 x, F16 n) {
  return {_mm512_scalef_ps(x.v, n.v)};
}
inline F16 zero_where_less(F16 x, F16 a, F16 b) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ), x.v)};
}
// Lanes from `count` on become `fill`.
inline F16 keep_first(F16 x, int count, float fill) {
  const __mmask16 keep = count >= 16 ? 0xffff : static_cast<__mmask16>((1u << (count < 0 ? 0 : count)) - 1);
  return {_mm512_mask_blend_ps(keep, _mm512_set1_ps(fill), x.v)};
}

#elif defined(__AVX2__)

struct F16 {
  __m256 low, high;
};

inline F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline __m256 load_half_8(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline F16 load_half(const uint16_t* from) { return {load_half_8(from), load_half_8(from + 8)}; }
// The first 8 lanes from memory, the others zero.
inline F16 load_8_halves(const uint16_t* from) { return {load_half_8(from), _mm256_setzero_ps()}; }
inline __m256 load_bfloat_8(const uint16_t* from) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline F16 load_bfloat(const uint16_t* from) { return {load_bfloat_8(from), load_bfloat_8(from + 8)}; }
inline void store(float* to, F16 x) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
inline void store_half(uint16_t* to, F16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}
// Whole numbers in [-128, 127].
inline void store_bytes(int8_t* to, F16 x) {
  // Packing works within each half: dwords 0-3 and 8-11 come before 4-7 and 12-15.
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}
inline F16 operator+(F16 a, F16 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F16 operator-(F16 a, F16 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F16 operator*(F16 a, F16 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F16 operator/(F16 a, F16 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
// a > b ? a : b in every lane (so b where one is not a number).
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline F16 magnitude(F16 x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline F16 round_even(F16 x) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.low, mode), _mm256_round_ps(x.high, mode)};
}
inline __m256 scale_by_power_8(__m256 x, __m256 n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(bits));
}
// x * 2^n for whole n in [-126, 127].
inline F16 scale_by_power(F16 x, F16 n) { return {scale_by_power_8(x.low, n.low), scale_by_power_8(x.high, n.high)}; }
inline F16 zero_where_less(F16 x, F16 a, F16 b) {
  return {_mm256_and_ps(x.low, _mm256_cmp_ps(a.low, b.low, _CMP_NLT_UQ)),
          _mm256_and_ps(x.high, _mm256_cmp_ps(a.high, b.high, _CMP_NLT_UQ))};
}
// Lanes from `count` on become `fill`.
inline F16 keep_first(F16 x, int count, float fill) {
  const __m256i limit = _mm256_set1_epi32(count);
  const __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
  const __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(limit, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)));
  const __m256 other = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(other, x.low, low), _mm256_blendv_ps(other, x.high, high)};
}

#else

struct F16 {
  float lane[16];
};

template <class Function>
inline F16 each_lane(Function function) {
  F16 result;
  for (int i = 0; i < 16; ++i) result.lane[i] = function(i);
  return result;
}
inline float float_of_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}
inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline F16 splat(float x) {
  return each_lane([=](int) { return x; });
}
inline F16 load(const float* from) {
  return each_lane([=](int i) { return from[i]; });
}
inline F16 load_half(const uint16_t* from) {
  return each_lane([=](int i) { return float_of_half(from[i]); });
}
// The first 8 lanes from memory, the others zero.
inline F16 load_8_halves(const uint16_t* from) {
  return each_lane([=](int i) { return i < 8 ? float_of_half(from[i]) : 0.0f; });
}
inline F16 load_bfloat(const uint16_t* from) {
  return each_lane([=](int i) { return float_of_bits(static_cast<uint32_t>(from[i]) << 16); });
}
inline void store(float* to, F16 x) { std::memcpy(to, x.lane, sizeof x.lane); }
inline void store_half(uint16_t* to, F16 x) {
  for (int i = 0; i < 16; ++i) {
    const _Float16 half = static_cast<_Float16>(x.lane[i]);
    std::memcpy(to + i, &half, sizeof half);
  }
}
// Whole numbers in [-128, 127].
inline void store_bytes(int8_t* to, F16 x) {
  for (int i = 0; i < 16; ++i) to[i] = static_cast<int8_t>(x.lane[i]);
}
inline F16 operator+(F16 a, F16 b) {
  return each_lane([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline F16 operator-(F16 a, F16 b) {
  return each_lane([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline F16 operator*(F16 a, F16 b) {
  return each_lane([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline F16 operator/(F16 a, F16 b) {
  return each_lane([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline F16 fma(F16 a, F16 b, F16 c) {
  return each_lane([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
}
// a > b ? a : b in every lane (so b where one is not a number).
inline F16 max(F16 a, F16 b) {
  return each_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F16 min(F16 a, F16 b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline F16 magnitude(F16 x) {
  return each_lane([&](int i) { return __builtin_fabsf(x.lane[i]); });
}
// Adding 1.5 * 2^23 rounds to a whole number, halves to even; larger numbers are whole already.
inline F16 round_even(F16 x) {
  return each_lane([&](int i) {
    const float rounded = (x.lane[i] + 12582912.0f) - 12582912.0f;
    return __builtin_fabsf(x.lane[i]) < 4194304.0f ? rounded : x.lane[i];
  });
}
// x * 2^n for whole n in [-126, 127].
inline F16 scale_by_power(F16 x, F16 n) {
  return each_lane([&](int i) {
    return x.lane[i] * float_of_bits(static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23);
  });
}
inline F16 zero_where_less(F16 x, F16 a, F16 b) {
  return each_lane([&](int i) { return a.lane[i] < b.lane[i] ? 0.0f : x.lane[i]; });
}
// Lanes from `count` on become `fill`.
inline F16 keep_first(F16 x, int count, float fill) {
  return each_lane([&](int i) { return i < count ? x.lane[i] : fill; });
}

#endif

inline F16 zeros() { return splat(0.0f); }

// The first `count` floats, the other lanes zero; reads nothing behind them.
inline F16 load_first(const float* from, int count) {
  if (count >= kLanes16) return load(from);
  float lanes[kLanes16] = {};
  std::memcpy(lanes, from, sizeof(float) * count);
  return load(lanes);
}

inline void store_first(float* to, F16 x, int count) {
  if (count >= kLanes16) return store(to, x);
  float lanes[kLanes16];
  store(lanes, x);
  std::memcpy(to, lanes, sizeof(float) * count);
}

inline float half_to_float(uint16_t half) {
  uint16_t halves[8] = {half};
  float lanes[kLanes16];
  store(lanes, load_8_halves(halves));
  return lanes[0];
}

// Joins lanes i and i + 8, then i and i + 4, i + 2, i + 1.
#if defined(__AVX2__)
#if defined(__AVX512F__)
inline __m256 low_half(F16 x) { return _mm512_castps512_ps256(x.v); }
inline __m256 high_half(F16 x) { return _mm512_extractf32x8_ps(x.v, 1); }
#else
inline __m256 low_half(F16 x) { return x.low; }
inline __m256 high_half(F16 x) { return x.high; }
#endif
inline float sum(F16 x) {
  const __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(F16 x) {
  const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
template <class Join>
inline float reduce(F16 x, Join join) {
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x.lane[i] = join(x.lane[i], x.lane[i + width]);
  return x.lane[0];
}
inline float sum(F16 x) {
  return reduce(x, [](float a, float b) { return a + b; });
}
inline float largest(F16 x) {
  return reduce(x, [](float a, float b) { return a > b ? a : b; });
}
#endif

// e^x, relative error below 2e-7; 0 below -87, e^88 above 88.
// Argument reduction and polynomial of Cephes' expf (Moshier), with fused multiply-adds.
inline F16 exp(F16 x) {
  const F16 lowest = splat(-87.0f);
  const F16 bounded = min(max(x, lowest), splat(88.0f));
  const F16 n = round_even(bounded * splat(1.44269504f));
  F16 r = fma(n, splat(-0.693359375f), bounded);
  r = fma(n, splat(2.12194440e-4f), r);
  F16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r + splat(1.0f));
  return zero_where_less(scale_by_power(p, n), x, lowest);
}

inline F16 silu(F16 x) { return x / (splat(1.0f) + exp(zeros() - x)); }
