// What hides scores. A mask says how far a row sees, from which KeyTiles follow, and which scores of a tile are hidden.
//
// Always: causality and the sequence's end. Beside them an instance may have one of three (mask/mask.cu prepares both):
//   KEY_LIST   all rows see the same keys. Only these are packed, one behind the other, so that nothing is left to hide
//              but the end, which differs from sequence to sequence. (Not with causality, which asks where a key stood.)
//   MASK_BITS  a bit a score, causality and the end among them. Key tiles that no row of a work tile sees are left out.
//   MASK_BIAS  a bias a score, −∞ where it is hidden, likewise.
// Where what is seen depends on key − row alone (windows, ALiBi), the blocks of bits or biases on a diagonal are alike and
// packed once; steps from block to block say which, so that the kernels need not know.
//
// In each case keys that no row sees do not count in K's and V's means and scales (KEYS_UNSEEN). Tiles before KeyTiles::full
// ask nothing of a mask without bits.
#pragma once
#include "ptx/copy.cuh"
#include "ptx/types.cuh"

constexpr int kMaskRows = 64;             // rows of a block of bits
constexpr int kWordKeys = TILE_KEYS / 4;  // keys of a thread's word: 8i + 2q and 8i + 2q + 1, as the MMA gives it scores

#if TILE_KEYS == 64
using MaskWord = u16;
#else
using MaskWord = u32;
#endif

// A list is of a head of K in a batch, or of several that see alike; a plane likewise, of a query head.
struct MaskArgs {
  const i32* key_counts;  // [lists]: keys that some row sees
  const i32* keys;        // [lists][kv_len]: which, ascending
  const u32* key_seen;    // [lists][tiles · TILE_KEYS / 32]: a bit a key, 1 if some row sees it
  const MaskWord* bits;   // [planes][blocks][64 rows][4 lanes]: a bit a score, 1 if it is seen
  const i32* tile_lists;  // [planes][⌈q_len / rows of a work tile⌉][tile_list_size]: how many are visited, and which
  const u16* bias;        // [planes][blocks][64 · TILE_KEYS], at bias_of_row: FP16, in base-2 logits, less row_bias
  const float* row_bias;  // [planes][row_blocks][64]: the largest of each row, in natural units
  const u8* row_seen;     // [planes][row_blocks][64]: whether it sees some key
  i32 list_batch, list_head;    // list number: batch · list_batch + head of K · list_head
  i32 plane_batch, plane_head;  // plane number, likewise, of a query head
  i32 row_blocks;               // of a plane: ⌈q_len / 64⌉, or 1 where all rows are alike
  i32 tile_list_size;           // 1 + tiles; or 2, where those that are visited are neighbours: the first alone
  // From one block of bits to that of the next 64 rows, of the next key tile, and besides to that of the last tile (which
  // has its keys' end) and, counted by row blocks, of the next plane; and which is the first.
  i32 row_step, tile_step, last_step, plane_step, first_block;
  i32 last_tile;

  __device__ __forceinline__ i64 list(i32 batch, i32 kv_head) const { return i64(batch) * list_batch + kv_head * list_head; }
  __device__ __forceinline__ i64 plane(i32 batch, i32 head) const { return i64(batch) * plane_batch + head * plane_head; }
  // The block of a row, and the row's place among the 64s of its plane.
  __device__ __forceinline__ i64 row_block(i32 batch, i32 head, i32 row) const {
    return plane(batch, head) * row_blocks + (row_blocks == 1 ? 0 : row / kMaskRows);
  }
  __device__ __forceinline__ i32 row_of(i32 row) const { return row_blocks == 1 ? row % kMaskRows : row; }
  // The block of bits of a row and a key tile is row_block(…) · row_step and the sum of these. (A block has 512 bytes or
  // more: 32 bits count them.)
  __device__ __forceinline__ i32 block_of_plane(i32 batch, i32 head) const {
    return i32(plane(batch, head)) * plane_step + first_block;
  }
  __device__ __forceinline__ i32 block_of_tile(i32 tile) const {
    return tile * tile_step + (tile == last_tile ? last_step : 0);
  }
  // How many tiles a work tile of the plane's visits, and (by `tile_at`) which.
  __device__ __forceinline__ const i32* tile_list(i32 batch, i32 head, i64 q_blocks, i32 q_block) const {
    return tile_lists + (plane(batch, head) * q_blocks + q_block) * tile_list_size;
  }
  __device__ __forceinline__ i32 tile_at(const i32* list, i32 i) const {
    const i32 in_list = tile_list_size == 2 ? 0 : i;
    return list[1 + in_list] + i - in_list;
  }
};

[[maybe_unused]] constexpr u16 kHidingHalf = 0xFC00;  // −∞ in FP16

// A warp reads a tile's biases four of a thread's word at a time, in places that follow each other: so lie those of a row
// and a lane of its quad.
constexpr int kBiasRun = 4, kNextRun = 32 * kBiasRun, kNextBiasRow = kWordKeys / kBiasRun * kNextRun;  // (of r + 8)
__device__ __forceinline__ i32 bias_of_row(i32 row, i32 lane_in_quad) {
  return row / 8 * kNextBiasRow + (row % 8 * 4 + lane_in_quad) * kBiasRun;
}

#if MASK_BIAS
struct Visible {  // the biases of a thread's keys, of its first row; those of its second lie kNextBiasRow further
  const u16* bias;
};
#elif MASK_BITS
struct Visible {  // which keys a thread's two rows see
  u32 bits[2];
  // Whether its score number i is hidden: of row i / 2 % 2, and of key 8 · (i / 4) + i % 2 from the thread's first on.
  __device__ __forceinline__ bool hides(int i) const { return !(bits[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1); }
};
#else
struct Visible {  // which keys a thread's two rows see: those up to last[half], counted from the thread's first key
  i32 last[2];
  // Whether its score number i is hidden: of row i / 2 % 2, and of key 8 · (i / 4) + i % 2.
  __device__ __forceinline__ bool hides(int i) const { return i / 4 * 8 + i % 2 > last[i / 2 % 2]; }
};
#endif

struct Mask {
  i32 causal_offset;  // row i sees key j if j ≤ i + causal_offset (kv_len without causality) and j < kv_len
  i32 kv_len;         // of those that are packed

  // The last key that a row sees; negative if it sees none.
  static __device__ __forceinline__ i32 last_key(i32 row, i32 causal_offset, i32 kv_len) {
    return min(row + causal_offset, kv_len - 1);
  }
  __device__ __forceinline__ i32 last_key(i32 row) const { return last_key(row, causal_offset, kv_len); }
};


// How many keys of a work tile's head are packed. Args hold kv_len and a MaskArgs.
template <class Args, class Tile>
__device__ __forceinline__ i32 packed_keys(const Args& args, const Tile& work) {
#if KEY_LIST
  const i32* from = args.mask.key_counts + args.mask.list(work.batch, work.kv_head);
  return *from;
#else
  return args.kv_len;
#endif
}
