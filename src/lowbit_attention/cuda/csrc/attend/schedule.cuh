// Which block of query rows a thread block works on, and which key tiles its rows see.
#pragma once
#include "tile/swizzle.cuh"

struct Work {
  i32 batch, head, kv_head, first_row;
};

// Items are blocks of query rows, those of one head next to each other (they share K and V in L2), the longest first.
__device__ inline Work work_item(i32 item, i32 q_blocks, i32 rows, i32 q_heads, i32 kv_heads) {
  const i32 block = q_blocks - 1 - item % q_blocks, head = item / q_blocks;
  return {head / q_heads, head % q_heads, head % q_heads / (q_heads / kv_heads), block * rows};
}

// The last key that a row sees: causality (key ≤ row + offset) and the sequence's end; negative if it sees none.
__device__ inline i32 last_key(i32 row, i32 causal_offset, i32 kv_len) { return min(row + causal_offset, kv_len - 1); }

struct KeyTiles {
  i32 full;   // tiles that every row sees whole
  i32 count;  // tiles that some row sees
};

__device__ inline KeyTiles key_tiles(i32 first_row, i32 rows, i32 q_len, i32 causal_offset, i32 kv_len) {
  if (first_row >= q_len) return {0, 0};
  const i32 last_row = min(first_row + rows, q_len) - 1;
  const i32 count = (last_key(last_row, causal_offset, kv_len) + kTileKeys) / kTileKeys;
  const i32 full = (last_key(first_row, causal_offset, kv_len) + 1) / kTileKeys;
  return {max(full, 0), max(count, 0)};
}
