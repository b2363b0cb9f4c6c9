// What this machine can do at most, as plain loops: reading memory, and 8-bit or float multiply-adds in registers.
#include <cstddef>
#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

extern "C" {

// Reads `num_bytes`, a multiple of 256.
uint64_t ceiling_read(const uint64_t* from, size_t num_bytes) {
  uint64_t sums[32] = {};
  for (size_t at = 0; at < num_bytes / 8; at += 32)
    for (int i = 0; i < 32; ++i) sums[i] += from[at + i];
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

// Does 16 independent chains of `count` vector products each, unrolled so that they stay in registers; returns the
// multiply-adds of one product.
#if defined(__AVX512VNNI__)

int ceiling_multiply(size_t count) {
  __m512i sums[16], a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) sums[k] = _mm512_setzero_si512();
  for (size_t i = 0; i < count; ++i)
#pragma GCC unroll 16
    for (int k = 0; k < 16; ++k) {
      sums[k] = _mm512_dpbusd_epi32(sums[k], a, b);
      asm volatile("" : "+v"(sums[k]));
    }
  return 64;
}

#elif defined(__AVX2__)

int ceiling_multiply(size_t count) {
  __m256i sums[8], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k) sums[k] = _mm256_setzero_si256();
  for (size_t i = 0; i < 2 * count; ++i)
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) {
      __m256i pairs = _mm256_maddubs_epi16(a, b);
      asm volatile("" : "+x"(pairs));
      sums[k] = _mm256_add_epi16(sums[k], pairs);
      asm volatile("" : "+x"(sums[k]));
    }
  return 32;
}

#else

int ceiling_multiply(size_t count) {
  volatile float start = 1.0f;
  float sums[16][4];
  for (auto& sum : sums)
    for (float& lane : sum) lane = start;
  for (size_t i = 0; i < count; ++i)
    for (auto& sum : sums)
      for (float& lane : sum) lane = lane * start + start;
  float total = 0.0f;
  for (auto& sum : sums)
    for (float lane : sum) total += lane;
  start = total;
  return 4;
}

#endif
}
