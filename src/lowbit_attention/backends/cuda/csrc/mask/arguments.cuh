// What the kernels that prepare masks are told.
#pragma once
#include "common/masks.cuh"

struct PrepareArgs {
  const void* mask;               // [B, H, Nq, Nk]: bool, 0 where a key is hidden, or biases in natural units
  i64 batch, head, row, key;      // strides in elements, 0 where it is broadcast
  i32 q_len, kv_len;
  i32 causal_offset;              // row i sees key j if j ≤ i + causal_offset; kv_len without causality
  i32 first_offset;               // and if j ≥ i + first_offset; −q_len without a window
  i32 planes_a_batch, lists_a_batch, group;  // `group` planes have a list
  i32 dtype;                      // of biases: Dtype of tile/strided.cuh
  i32 tiles, row_blocks;
  i32 lists_seen;                 // list_keys: what pack_bits has seen, not the mask
  i32 q_blocks, row_blocks_a_block;  // work tiles' rows, and how many blocks of bits they have
  i32* key_counts;
  i32* keys;
  u32* key_seen;                  // 0 before pack_bits; list_keys reads it, where `lists_seen`
  MaskWord* bits;
  u16* bias;
  float* row_bias;
  i32* tile_lists;
  u8* row_seen;                   // 0 before pack_bits
  u8* tile_seen;                  // [planes][row_blocks][tiles]
  // Of list_by_place and pack_diagonals:
  const float* slopes;            // [B, Hq] by `batch` and `head`: adds −slope · |row + shift − key|; or null
  const void* kv_lens;            // [B] by `batch`: keys from there on are hidden; or null
  i32 long_lens;                  // these are of 64 bits, else of 32
  i32 shift, nearest;             // of slopes; the distance of the nearest key that a row sees, of those that see some
  i32 diagonals, blocks;          // of a plane: below
};
