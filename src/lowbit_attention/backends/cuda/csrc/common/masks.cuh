// What hides scores. A mask says how far a row sees, from which KeyTiles follow, and which scores of a tile are hidden.
//
// Here: causality and the sequence's end. Another mask (key padding, bool, bias) is another struct with these members;
// tiles before KeyTiles::full ask none of them.
#pragma once
#include "ptx/types.cuh"

struct Visible {  // which keys a thread's two rows see: those up to last[half], counted from the thread's first key
  i32 last[2];
  // Whether its score number i is hidden: of row i / 2 % 2, and of key 8 · (i / 4) + i % 2.
  __device__ __forceinline__ bool hides(int i) const { return i / 4 * 8 + i % 2 > last[i / 2 % 2]; }
};

struct Mask {
  i32 causal_offset;  // row i sees key j if j ≤ i + causal_offset (kv_len without causality) and j < kv_len
  i32 kv_len;

  // The last key that a row sees; negative if it sees none.
  static __device__ __forceinline__ i32 last_key(i32 row, i32 causal_offset, i32 kv_len) {
    return min(row + causal_offset, kv_len - 1);
  }
  __device__ __forceinline__ i32 last_key(i32 row) const { return last_key(row, causal_offset, kv_len); }
};
