// A block of bits or biases as a warp writes it: 64 rows of a key tile, sixteen keys a lane.
#pragma once
#include "common/masks.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

constexpr int kPackThreads = 256, kPackWarps = kPackThreads / 32;
constexpr int kKeysALane = 16;                    // neighbouring keys of a row
constexpr int kRowLanes = TILE_KEYS / kKeysALane;
constexpr int kRowsAtOnce = 32 / kRowLanes, kSteps = kMaskRows / kRowsAtOnce;

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kHidingBias = 9000.0f;  // below the row's largest: e^−9000 is 0 in every format

struct PackLane {
  i32 lane = threadIdx.x % 32 % kRowLanes;     // of a row's
  i32 first_key = lane * kKeysALane;           // of a tile
  i32 first_row = threadIdx.x % 32 / kRowLanes;
  __device__ i32 row(int step) const { return step * kRowsAtOnce + first_row; }
};

// Bits [low, high] of 16, which may lie anywhere.
__device__ u32 range_of_sixteen(i64 low, i64 high) {
  if (low > 15 || high < 0 || low > high) return 0;
  const u32 from = 0xFFFFu << (low > 0 ? u32(low) : 0u), to = 0xFFFFu >> (high < 15 ? u32(15 - high) : 0u);
  return from & to & 0xFFFF;
}

// Of sixteen keys' bits: in nibble q keys 2q, 2q + 1, 8 + 2q and 9 + 2q, which an MMA gives to lane q of a quad.
__device__ u32 by_quad_lane(u32 seen) {
  u32 x = (seen | seen << 8) & 0x00FF00FF;
  x = (x | x << 4) & 0x0F0F0F0F;
  x = (x | x << 2) & 0x33333333;
  return (x | x >> 14) & 0xFFFF;
}

// The nibbles of four lanes, of two rows (the second's in the upper half): then lane q of them has nibble q of all.
__device__ u32 exchange_nibbles(u32 x, i32 lane) {
  const bool second = lane & 2, first = lane & 1;
  u32 keep = (second ? x >> 8 : x) & 0x00FF00FF;
  u32 send = (second ? x : x >> 8) & 0x00FF00FF;
  u32 got = __shfl_xor_sync(0xFFFFFFFF, send, 2);
  x = second ? got | keep << 8 : keep | got << 8;
  keep = (first ? x >> 4 : x) & 0x0F0F0F0F;
  send = (first ? x : x >> 4) & 0x0F0F0F0F;
  got = __shfl_xor_sync(0xFFFFFFFF, send, 1);
  x = first ? got | keep << 4 : keep | got << 4;
  return x;
}

// Of eight lanes each four have half of two rows' words: the first four get the first row's, the others the second's.
__device__ u32 join_halves(u32 x, i32 lane) {
  const bool upper = lane & 4;
  const u32 send = upper ? x & 0xFFFF : x >> 16;
  const u32 got = __shfl_xor_sync(0xFFFFFFFF, send, 4);
  x = upper ? got | (x & 0xFFFF0000) : (x & 0xFFFF) | got << 16;
  return x;
}

// The words of two rows of a block (common/masks.cuh), of which each lane has sixteen keys.
__device__ void store_words(MaskWord* block, const PackLane& mine, int step, u32 seen, u32 seen_next) {
  const u32 x = exchange_nibbles(by_quad_lane(seen) | by_quad_lane(seen_next) << 16, mine.lane);
#if TILE_KEYS == 64
  block[mine.row(step) * 4 + mine.lane] = MaskWord(x);
  block[mine.row(step + 1) * 4 + mine.lane] = MaskWord(x >> 16);
#else
  block[mine.row(step + mine.lane / 4) * 4 + mine.lane % 4] = join_halves(x, mine.lane);
#endif
}

// A lane's biases of a row of a block, in base-2 logits.
__device__ void store_biases(u16* block, const PackLane& mine, int step, const float (&x)[kKeysALane]) {
#pragma unroll
  for (int q = 0; q < 4; q += 2) {  // (of neighbouring lanes of a quad, whose places are neighbours)
    u16* to = block + bias_of_row(mine.row(step), q) + mine.lane * kNextRun;
    *reinterpret_cast<Vec16*>(to) = {
        cvt_f16x2_f32(x[2 * q + 1], x[2 * q]), cvt_f16x2_f32(x[2 * q + 9], x[2 * q + 8]),
        cvt_f16x2_f32(x[2 * q + 3], x[2 * q + 2]), cvt_f16x2_f32(x[2 * q + 11], x[2 * q + 10])};
  }
}
