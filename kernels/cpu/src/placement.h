// Where rows and their pages stand; see kernels/placement.py.
#pragma once

#include <cstdint>

struct Placement {
  const int32_t* positions;   // [R]
  const int32_t* sequences;   // [R]
  const int32_t* page_table;  // [S, max_pages]
  int64_t num_rows;
  int64_t num_sequences;
  int64_t max_pages;

  const int32_t* pages_of(int64_t row) const { return page_table + sequences[row] * max_pages; }
};

struct Pages {
  uint16_t* keys;    // [P, G, D, B] fp16
  uint16_t* values;  // [P, G, B, D] fp16
  int64_t num_pages;
  int64_t num_groups;
  int64_t head_dim;
  int64_t page_size;

  // Numbers of one head in one page, of keys or of values.
  int64_t head_size() const { return head_dim * page_size; }
  int64_t head_at(int64_t page, int64_t group) const { return (page * num_groups + group) * head_size(); }
};
