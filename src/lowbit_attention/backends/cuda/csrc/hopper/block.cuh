// A thread block of attention_wgmma: its arguments, its numbers, its shared memory, and which rows it works on.
#pragma once
#include "common/softmax.cuh"
#include "common/keys.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

struct AttentionArgs {
  Strided q;              // [B, Hq, Nq, D]
  void* out;              // [B, Hq, Nq, Dv] in q's type, channels next to each other
  i64 out_batch, out_head, out_token;  // strides in elements
  float* lse;             // [B, Hq, Nq], or null
  const u8* k_tiles;      // [B · Hkv][tiles][128 keys × kDim]
  const float* k_scales;  // [B · Hkv][tiles][4]
  const u8* v_tiles;      // [B · Hkv][tiles][kDim × 128 keys]
  const float* k_mean;    // [B · Hkv][kDim], for lse
  const float* k_largest_scale;  // [B · Hkv], of all tiles
  const float* v_scale;   // [B · Hkv][kDim]
  const float* v_mean;    // [B · Hkv][kDim]
  float sm_scale;         // logits = sm_scale · q · k
  float logits_scale;     // |sm_scale| · log2 e
  float log2_p_max;       // log2 P_r, rounded down
  float p_max;            // P_r
  float slack, headroom;  // of RestartedMax
  i32 q_heads, kv_heads, q_len, kv_len, channels, v_channels;
  i32 causal_offset;      // query i sees key j if j ≤ i + causal_offset; kv_len without causality
  i32 tiles, items;       // items: work tiles
  i32 whole_items, rest;  // the first are whole blocks of rows; then `rest` blocks, in as many pieces as fill the card
  Schedule schedule;
  u32* taken;             // work tiles that thread blocks have taken beside their first ones; 0
  i32 key_splits;         // a block's pieces of the rest: if 1, some of its rows and all keys, else all rows and some keys
  Vec16* partials;        // [key_splits][rest][kConsumers][4 warps][kDim / 8 + 1][32], where keys are split
  u32* arrivals;          // [rest][kConsumers][4 warps], zeros: the splits that have written theirs
  MaskArgs mask;
  SequenceArgs sequences; // with SEQUENCES
#if TILE_MEANS || JUMP
  const u16* v_tile_means;  // [B · Hkv][tiles][kDim], FP16: what was taken off V's codes
#endif
#if JUMP
  float jump, jump_bits;  // of RestartedMax; log2 of what P gains in a tile that jumps
#endif
};

// ---- tile numbers: those that are not here, kDim to kSharedBytes, come from configs.py, which says why

constexpr Dtype kInput = Dtype(INPUT_DTYPE);
constexpr int kTileBytes = kTileKeys * kDim;
constexpr float kLn2 = 0.6931471805599453f;
constexpr int kQueryWarps = 3;                // of the producer's warpgroup

enum NamedBarrier : u32 {  // 0 is __syncthreads'
  kPingPongBarrier = 1,    // the first consumer's; each has its own
  kWorkTileBarrier = kPingPongBarrier + kConsumers,  // of the warps that quantize Q
};

struct WorkTile : Work {
  i32 end_row;  // rows from here on are no part of it
#if SEQUENCES
  i32 kv_len, causal_offset;  // of its sequence
#elif KEY_LIST
  i32 kv_len;      // of its head's packed keys
#elif LISTS_TILES
  i32 tiles;       // that it visits
#endif
#if SPLITS_KEYS
  i32 first_tile, end_tile;  // of keys
  i32 split;                 // which of the keys' splits this is, −1 if they are not split
  i32 rest_block;            // which of the blocks that are left for the tail wave
#endif
};

struct Shared {
  alignas(1024) u8 k[kStages][kTileBytes];
  alignas(1024) u8 v[kStages][kTileBytes + kOnes * kTileKeys];
  alignas(1024) u8 q[2][kConsumers][kRows * kDim];
#if OUTPUT_IN_SHARED
  // A warp's own: O between promotions (each thread's numbers, four by four), and 16-bit rows on their way out.
  Vec16 o[kConsumers][4][kDim / 8][32];
#endif
#if HALVES_SCORES
  Promoted promoted[kConsumers][128];       // a thread's own
#elif SEEN_IN_SHARED
  float seen[kConsumers][4][8][2];          // Promoted's, of rows r and r + 8
#endif
  float v_scale[2][kDim], v_mean[2][kDim];  // of the head of each work tile
#if TILE_MEANS
  alignas(16) u16 tile_means[2][kMeanSlots][kMeanPitch];  // of each work tile's keys, tile mod kMeanSlots
#endif
  float k_scale[kStages][4];
  float q_scale[2][kConsumers][4][8];       // of a warp's rows r and r + 8, in base-2 logits
  float mean_logit[2][kConsumers][kRows];   // sm_scale · q · k̄
  float k_largest_scale[2];                 // of the head's tiles
  u8 spoilt[2][kConsumers][4][8];           // of a warp's rows r (1) and r + 8 (2): which have a NaN or an infinity
#if LISTS_TILES
  i32 tile_block[2][kTileSlots];            // the block of bits of the first 64 rows and a tile, tile mod kTileSlots
#endif
  WorkTile work[2];                           // end_row < 0: no work is left
  u64 full[kStages], empty[kStages], q_full[2], q_empty[2];
#if TAKES_WORK
  u64 work_full[2], next_wanted;
#endif
};
static_assert(sizeof(Shared) == kSharedBytes, "the host plans another size");

template <int kLength>
struct Ring {  // a place in a ring of stages, and the parity of the barriers' phase there
  int stage = 0;
  u32 parity = 0;
  __device__ void next() {
    if (++stage == kLength) stage = 0, parity ^= 1;
  }
};

__device__ inline i32 first_tile(const WorkTile& work) {
#if SPLITS_KEYS
  return work.first_tile;
#else
  return 0;
#endif
}

#if LISTS_TILES
__device__ inline i32 mask_block(const AttentionArgs& args, const WorkTile& work) {
  return args.mask.row_block(work.batch, work.head, work.first_row);
}
// How many key tiles a work tile visits, and which.
__device__ inline const i32* tile_list(const AttentionArgs& args, const WorkTile& work) {
  return args.mask.tile_list(work.batch, work.head, args.schedule.q_blocks, work.first_row / (kConsumers * kRows));
}
#endif

#if SEQUENCES
__device__ inline i32 items_of(const AttentionArgs& args) { return args.sequences.item_starts[args.sequences.count]; }
// A sequence's heads follow each other, and of each the blocks of rows, the last first (which see the most keys). The host
// does not know how many items there are: end_row < 0 says that this is none.
__device__ inline WorkTile work_of(const AttentionArgs& args, i32 item) {
  constexpr int kBlock = kConsumers * kRows;
  const SequenceArgs& all = args.sequences;
  WorkTile tile = {};
  tile.end_row = -1;
  if (item >= items_of(args)) return tile;
  const i32 place = last_start(all.item_starts, all.count, item), rest = item - all.item_starts[place];
  tile.batch = all.order[place];
  const i32 rows = all.q_counts[tile.batch], blocks = (rows + kBlock - 1) / kBlock;
  tile.head = rest / blocks;
  tile.kv_head = divide(tile.head, args.schedule.by_group);
  tile.first_row = (blocks - 1 - (rest - tile.head * blocks)) * kBlock;
  tile.end_row = min(tile.first_row + kBlock, rows);
  tile.kv_len = all.key_counts[tile.batch];
  tile.causal_offset = all.causal_offsets[tile.batch];
#if SPLITS_KEYS
  tile.end_tile = (tile.kv_len + kTileKeys - 1) / kTileKeys;
  tile.split = -1;
#endif
  return tile;
}
#else
__device__ inline i32 items_of(const AttentionArgs& args) { return args.items; }
// The blocks of the tail wave are too few for the card, so each is cut: between its warpgroups, into up to kConsumers
// pieces, or along the keys, if there are many (SPLITS_KEYS). All first pieces, then all second ones.
__device__ inline WorkTile work_of(const AttentionArgs& args, i32 item) {
  constexpr int kBlock = kConsumers * kRows;
  int rows = kBlock, first = 0;
  i32 split = -1;
  if (item >= args.whole_items) {
    const i32 cut = item - args.whole_items, count = args.items - args.whole_items;  // `rest` times the pieces a block
    if (SPLITS_KEYS && args.key_splits > 1) {
      split = cut / args.rest;
      item -= split * args.rest;
    } else {
      // in two or three, or four consumers in one, two or four
      const int number = (cut >= args.rest) + (kConsumers > 2 && cut >= 2 * args.rest) +
                         (kConsumers > 3 && cut >= 3 * args.rest);
      rows = kConsumers > 2 && count == 2 * args.rest ? 2 * kRows : count > args.rest ? kRows : kBlock;
      first = number * rows;
      item -= number * args.rest;
    }
  }
  const Work work = work_item(item, args.schedule, kBlock);
  const i32 block_end = min(work.first_row + kBlock, args.q_len);
  WorkTile tile = {work.batch, work.head, work.kv_head, work.first_row + first, min(work.first_row + first + rows, block_end)};
  i32 tiles = args.tiles;
#if KEY_LIST
  tile.kv_len = packed_keys(args, work);
  tiles = (tile.kv_len + kTileKeys - 1) / kTileKeys;
#elif LISTS_TILES
  tile.tiles = tiles = tile_list(args, tile)[0];
#endif
#if SPLITS_KEYS
  tile.first_tile = split < 0 ? 0 : tiles * split / args.key_splits;
  tile.end_tile = split < 0 ? tiles : tiles * (split + 1) / args.key_splits;
  tile.split = split;
  tile.rest_block = item - args.whole_items;
#endif
  return tile;
}
#endif

#if SEQUENCES
// The number of its head's first packed tile.
__device__ inline i64 first_tile_of_sequence(const AttentionArgs& args, const WorkTile& work) {
  return i64(work.kv_head) * args.tiles + args.sequences.tile_starts[work.batch];
}
#endif

__device__ inline i32 kv_len_of(const AttentionArgs& args, const WorkTile& work) {
#if KEY_LIST || SEQUENCES
  return work.kv_len;
#else
  return args.kv_len;
#endif
}
__device__ inline i32 causal_offset_of(const AttentionArgs& args, const WorkTile& work) {
#if SEQUENCES
  return work.causal_offset;
#else
  return args.causal_offset;
#endif
}

// Tiles that some of these rows see, of the work tile's; counted from its first.
__device__ inline KeyTiles tiles_of(const AttentionArgs& args, i32 first_row, i32 rows, const WorkTile& work) {
#if LISTS_TILES
  const i32 count = first_row < work.end_row ? work.tiles : 0;
  const KeyTiles tiles = {MASK_BIAS ? 0 : count, count};  // (with bits the fast path hides scores, too)
#else
  const KeyTiles tiles = KeyTiles::of(first_row, rows, work.end_row, Mask{causal_offset_of(args, work), kv_len_of(args, work)});
#endif
#if SPLITS_KEYS
  return tiles.within(work.first_tile, work.end_tile);
#else
  return tiles;
#endif
}

struct RowsSeen {  // whether a row of a work tile sees some key: else it does not count in its scale
#if LISTS_TILES
  const i64 first;  // the work tile's first row
  const MaskArgs& mask;
  __device__ RowsSeen(const AttentionArgs& args, const WorkTile& work)
      : first(i64(mask_block(args, work)) * kMaskRows), mask(args.mask) {}
  __device__ bool operator()(int row) const { return mask.row_seen[first + mask.row_of(row)]; }
  // What its biases have lost, for lse.
  __device__ float bias(int row) const { return mask.row_bias[first + mask.row_of(row)]; }
#else  // (the host, or sequences/sequences.cu, leaves out those from which causality hides all keys)
  __device__ RowsSeen(const AttentionArgs&, const WorkTile&) {}
  __device__ bool operator()(int) const { return true; }
#endif
};

struct Thread {  // where a thread stands in its warpgroup
  int group, warp, quad, lane_in_quad;
  __device__ Thread()
      : group(__shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0)),  // (so that the compiler knows it is the warp's)
        warp(__shfl_sync(0xFFFFFFFF, threadIdx.x / 32 % 4, 0)),
        quad(threadIdx.x % 32 / 4),
        // (where S2R would read it again for every tile: what a shuffle gives is kept)
        lane_in_quad(OUTPUT_IN_SHARED && !MAKES_MORE ? __shfl_sync(0xFFFFFFFF, threadIdx.x % 4, threadIdx.x % 32)
                                                     : threadIdx.x % 4) {}
  __device__ int row(int half) const { return 16 * warp + quad + 8 * half; }
};
