// A counter-based generator: Philox4x32 with 10 rounds, as in kernels/sample/philox.py.
#pragma once

#include <cstdint>

namespace sampling {

inline void philox4x32(uint32_t c[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// floor(total * u), u the random number in [0, 1) of 62 bits that belongs to (seed, index, position).
inline int64_t draw_below(int64_t total, uint64_t seed, int32_t index, int64_t position) {
  uint32_t c[4] = {static_cast<uint32_t>(index), 0, static_cast<uint32_t>(position),
                   static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32)};
  philox4x32(c, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  const int64_t high = c[0] >> 1, low = c[1] >> 1;  // 31 bits each; total is below 2^60
  const int64_t total_high = total >> 31, total_low = total & 0x7FFFFFFF;
  return total_high * high + ((total_high * low + total_low * high + ((total_low * low) >> 31)) >> 31);
}

}  // namespace sampling
