// One pool of threads behind all ops.
//
// Work is a range of indices. Each thread has a share of it, that it takes one by one, and then what others have left.
// The calling thread works too and never waits for a thread that has not begun, so a worker that sleeps costs its help
// and nothing else. Beside a busy process on one of the cores a worker is left out while that is faster.
#pragma once

#include <cstdint>
#include <type_traits>

// Threads that an op may use, the caller's among them.
int num_threads();
// Takes effect with the next op. Waits for an op that runs.
void set_num_threads(int count);

using IndexedBody = void (*)(void* context, int64_t index);
void run_indices(int64_t count, IndexedBody body, void* context);

// Calls body(i) once for every i in [0, count), in any order, on any thread. One call at a time; others wait.
// Bodies must not throw and must not call parallel_for.
template <class Body>
void parallel_for(int64_t count, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_indices(
      count, [](void* context, int64_t index) { (*static_cast<Plain*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&body)));
}
