// A thread block of attention_mma: its arguments, its numbers, its shared memory.
#pragma once
#include "common/keys.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

struct MmaArgs {
  Strided q;              // [B, Hq, Nq, D]
  void* out;              // [B, Hq, Nq, Dv] in q's type, channels next to each other
  i64 out_batch, out_head, out_token;  // strides in elements
  float* lse;             // [B, Hq, Nq], or null
  const u8* tiles;        // [B · Hkv][tile_count]: a PackedTile each
  const float* k_mean;    // [B · Hkv][kDim], for lse
  const float* k_largest_scale;  // [B · Hkv], of all tiles
  const float* v_scale;   // [B · Hkv][kDim]
  const float* v_mean;    // [B · Hkv][kDim]
  const float* q_mean;    // [B · Hq][query tiles of 128][kDim]
  const float* delta;     // [this launch's query tiles][64 · tile_count], in base-2 logits
  float sm_scale;         // logits = sm_scale · q · k
  float logits_scale;     // |sm_scale| · log2 e
  float log2_p_max;       // log2 P_r, rounded down
  float largest_fast_factor;  // of a score's unit in logits; above it tiles take the exact path
  i32 q_heads, kv_heads, q_len, kv_len, channels, v_channels;
  i32 causal_offset;      // query i sees key j if j ≤ i + causal_offset; kv_len without causality
  i32 tile_count, first_item;
  i32 dtype, q_max, q_granularity;
  Schedule schedule;
  MaskArgs mask;
  SequenceArgs sequences; // with SEQUENCES
};

// ---- tile numbers: those that are not here, kDim to kSharedBytes, come from configs.py, which says why

constexpr int kScores = kTileKeys / 2;  // of a thread and an m16 block: 2 rows × 16 keys
constexpr float kLn2 = 0.6931471805599453f;
[[maybe_unused]] constexpr float kMostUnits = 2097152.0f;  // 2^21 of ΔS, beside |s| < 2^21: together they stay exact with kMagic

struct PackedTile {  // as pack/pack.cu writes them
  u8 k[kKTileBytes];     // [64 keys][kDim] lanes
  u8 v[kVTileBytes];     // E4M3 [kDim][64 keys], or FP16 [64 keys][kDim]
  float k_scale[4];
  u8 unused[112];        // rows begin at multiples of 128
};

struct Stage {
  u8 k[kKTileBytes];
  u8 v[kVTileBytes];
#if SMOOTH_Q
  float delta[kGroups][kTileKeys];
#endif
};

struct Shared {
  Stage stages[kStages];
  u8 q[kWarps][kWarpRows * kQkRowBytes];
  float warp_max[kGroups][4];
  u8 spoilt[kThreads];  // of each thread's four rows, a bit a row: which have a NaN or an infinity
};
static_assert(sizeof(Shared) == kSharedBytes, "the host plans another size");

#if LISTS_TILES
// How many key tiles a block visits, and which.
__device__ __forceinline__ const i32* tile_list(const MmaArgs& args, const Work& work) {
  return args.mask.tile_list(work.batch, work.head, args.schedule.q_blocks, work.first_row / kRows);
}
#endif

// A block's work, how many rows and keys its sequence has, how far they see, and where its head's first packed tile lies.
// (It is found again rather than kept; of sequences by a search.)
#if SEQUENCES
__device__ __forceinline__ bool is_item(const MmaArgs& args, i32 item) {
  return item < args.sequences.item_starts[args.sequences.count];
}
__device__ __forceinline__ Work work_of(const MmaArgs& args, i32 item) {
  const SequenceArgs& all = args.sequences;
  const i32 place = last_start(all.item_starts, all.count, item), rest = item - all.item_starts[place];
  const i32 batch = all.order[place], blocks = (all.q_counts[batch] + kRows - 1) / kRows, head = rest / blocks;
  return {batch, head, divide(head, args.schedule.by_group), (blocks - 1 - (rest - head * blocks)) * kRows};
}
__device__ __forceinline__ i32 rows_of(const MmaArgs& args, const Work& work) { return args.sequences.q_counts[work.batch]; }
__device__ __forceinline__ i32 keys_of(const MmaArgs& args, const Work& work) { return args.sequences.key_counts[work.batch]; }
__device__ __forceinline__ i32 causal_offset_of(const MmaArgs& args, const Work& work) {
  return args.sequences.causal_offsets[work.batch];
}
// The first row's first element in Q and in the output, and its number in lse.
__device__ __forceinline__ i64 q_base(const MmaArgs& args, const Work& work) { return Sequence{args, work}.in_q(0); }
__device__ __forceinline__ i64 output_base(const MmaArgs& args, const Work& work) { return Sequence{args, work}.in_output(0); }
__device__ __forceinline__ i64 first_lse(const MmaArgs& args, const Work& work) { return Sequence{args, work}.in_lse(0); }
__device__ __forceinline__ i64 first_tile_of(const MmaArgs& args, const Work& work) {
  return i64(work.kv_head) * args.tile_count + args.sequences.tile_starts[work.batch];
}
#else
__device__ __forceinline__ bool is_item(const MmaArgs&, i32) { return true; }
__device__ __forceinline__ Work work_of(const MmaArgs& args, i32 item) { return work_item(item, args.schedule, kRows); }
__device__ __forceinline__ i32 rows_of(const MmaArgs& args, const Work&) { return args.q_len; }
__device__ __forceinline__ i32 keys_of(const MmaArgs& args, const Work& work) { return packed_keys(args, work); }
__device__ __forceinline__ i32 causal_offset_of(const MmaArgs& args, const Work&) { return args.causal_offset; }
__device__ __forceinline__ i64 q_base(const MmaArgs& args, const Work& work) {
  return i64(work.batch) * args.q.batch + i64(work.head) * args.q.head;
}
__device__ __forceinline__ i64 output_base(const MmaArgs& args, const Work& work) {
  return work.batch * args.out_batch + work.head * args.out_head;
}
__device__ __forceinline__ i64 first_lse(const MmaArgs& args, const Work& work) {
  return (i64(work.batch) * args.q_heads + work.head) * args.q_len;
}
__device__ __forceinline__ i64 first_tile_of(const MmaArgs& args, const Work& work) {
  return (i64(work.batch) * args.kv_heads + work.kv_head) * args.tile_count;
}
#endif

// Key tiles that some of these rows see. (With bits none is known to be seen whole.)
__device__ __forceinline__ KeyTiles tiles_of(const MmaArgs& args, const Work& work, i32 first_row, i32 rows) {
#if LISTS_TILES
  return {0, first_row < args.q_len ? tile_list(args, work)[0] : 0};
#else
  return KeyTiles::of(first_row, rows, rows_of(args, work), Mask{causal_offset_of(args, work), keys_of(args, work)});
#endif
}

struct RowsSeen {  // whether a row sees some key: else it does not count in its scale
#if LISTS_TILES
  const i64 first;  // the plane's first row
  const MaskArgs& mask;
  __device__ __forceinline__ RowsSeen(const MmaArgs& args, const Work& work)
      : first(args.mask.row_block(work.batch, work.head, 0) * kMaskRows), mask(args.mask) {}
  __device__ __forceinline__ bool operator()(i32 row) const { return mask.row_seen[first + mask.row_of(row)]; }
  // What its biases have lost, for lse.
  __device__ __forceinline__ float bias(i32 row) const { return mask.row_bias[first + mask.row_of(row)]; }
#else  // (the host, or sequences/sequences.cu, leaves out those from which causality hides all keys)
  __device__ __forceinline__ RowsSeen(const MmaArgs&, const Work&) {}
  __device__ __forceinline__ bool operator()(i32) const { return true; }
#endif
};
