// A step's calls, one after the other, without Python between them; see kernels/cpu/tape.py.

#include <cstdint>

#include "weight.h"

extern "C" {

int64_t pathfox_embed(const Weight* weight, const int32_t* ids, int64_t num_ids, float* out);

struct Call {
  void* function;         // takes one struct
  const void* arguments;  // the struct
  int64_t is_checked;     // the function returns the first bad index or -1; else it returns nothing
};

struct Tape {
  const Call* calls;
  int64_t num_calls;
  int64_t bad_index;  // written when a call complains
};

// Makes the calls in order. Returns the first that complains, which ends the replay, or -1.
int64_t pathfox_replay(Tape* tape) {
  for (int64_t i = 0; i < tape->num_calls; ++i) {
    const Call& call = tape->calls[i];
    if (call.is_checked == 0) {
      reinterpret_cast<void (*)(const void*)>(call.function)(call.arguments);
      continue;
    }
    const int64_t bad_index = reinterpret_cast<int64_t (*)(const void*)>(call.function)(call.arguments);
    if (bad_index < 0) continue;
    tape->bad_index = bad_index;
    return i;
  }
  return -1;
}

struct EmbedCall {
  const Weight* weight;
  const int32_t* token_ids;  // [R]
  int64_t num_rows;          // R
  float* out;                // [R, K]
};

// `pathfox_embed` as a tape calls it.
int64_t pathfox_embed_rows(const EmbedCall* call) {
  return pathfox_embed(call->weight, call->token_ids, call->num_rows, call->out);
}

struct IndicesCall {
  const int32_t* indices;  // [L]
  int64_t count;           // L
  int64_t limit;
};

// Returns the first index that is not in 0 .. limit - 1, or -1.
int64_t pathfox_check_indices(const IndicesCall* call) {
  for (int64_t i = 0; i < call->count; ++i)
    if (call->indices[i] < 0 || call->indices[i] >= call->limit) return i;
  return -1;
}
}
