// Where a sequence's rows and keys lie, and which key tiles a block of rows visits. (attention_mma writes out what
// Sequence says: with smooth Q its code would be scheduled otherwise.)
#pragma once
#include "common/masks.cuh"
#include "common/sequences.cuh"
#include "common/work.cuh"
#include "tile/swizzle.cuh"

// All sequences of a batch are equally long; or they lie one behind the other (SEQUENCES). Made of a kernel's arguments,
// which hold q, out_batch, out_head, out_token, q_heads, kv_heads and q_len, and of a work tile.
template <class Args>
struct Sequence {
  const Args& args;
  const Work& work;

#if SEQUENCES
  __device__ __forceinline__ i64 token(i32 row) const { return args.sequences.q_starts[work.batch] + i64(row); }
  __device__ __forceinline__ i64 in_q(i32 row) const { return work.head * args.q.head + token(row) * args.q.token; }
  __device__ __forceinline__ i64 in_output(i32 row) const { return work.head * args.out_head + token(row) * args.out_token; }
  __device__ __forceinline__ i64 in_lse(i32 row) const { return i64(work.head) * args.sequences.tokens + token(row); }
#else
  // The row's first element in Q and in the output, and its number in lse.
  __device__ __forceinline__ i64 in_q(i32 row) const {
    return i64(work.batch) * args.q.batch + i64(work.head) * args.q.head + i64(row) * args.q.token;
  }
  __device__ __forceinline__ i64 in_output(i32 row) const {
    return work.batch * args.out_batch + work.head * args.out_head + row * args.out_token;
  }
  __device__ __forceinline__ i64 in_lse(i32 row) const {
    return (i64(work.batch) * args.q_heads + work.head) * args.q_len + row;
  }
#endif
  // The head of K and V, of all heads of the batch.
  __device__ __forceinline__ i64 kv_head() const { return i64(work.batch) * args.kv_heads + work.kv_head; }
};
template <class Args>
Sequence(const Args&, const Work&) -> Sequence<Args>;

// The key tiles that some of a block's rows see: all from the first to the last, in that order. They lie one behind the
// other in memory. (A window or a block list would say here which is visited next; a page table, where it lies.)
struct KeyTiles {
  i32 full;   // the first of them, which every row sees whole: no score of theirs is hidden
  i32 count;  // all of them

  // For rows [first_row, first_row + rows) before end_row.
  static __device__ __forceinline__ KeyTiles of(i32 first_row, i32 rows, i32 end_row, const Mask& mask) {
    if (first_row >= end_row) return {0, 0};
    const i32 last_row = min(first_row + rows, end_row) - 1;
    const i32 count = (mask.last_key(last_row) + kTileKeys) / kTileKeys;
    const i32 full = (mask.last_key(first_row) + 1) / kTileKeys;
    return {max(full, 0), max(count, 0)};
  }
  // Those of [first, end) alone, counted from `first`.
  __device__ __forceinline__ KeyTiles within(i32 first, i32 end) const {
    KeyTiles tiles = *this;
    tiles.count = max(min(tiles.count, end) - first, 0);
    tiles.full = max(min(tiles.full, end) - first, 0);
    return tiles;
  }
};
