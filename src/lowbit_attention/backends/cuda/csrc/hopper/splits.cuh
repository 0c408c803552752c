// The sums of a block of rows whose keys are split between thread blocks.
#pragma once
#include "common/softmax.cuh"
#include "hopper/block.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"

#if SPLITS_KEYS
// Writes what a warp has summed up over its keys: `own` (O in shared memory) and its row sums. If the other splits' is
// there as well, adds all up, in the splits' order and in their place, and says so.
__device__ __forceinline__ bool last_of_splits(const AttentionArgs& args, const WorkTile& work, const Thread& thread,
                                               Vec16 (&own)[kDim / 8][32], Rows& rows, Promoted& promoted) {
  constexpr i64 kPart = (kDim / 8 + 1) * 32;  // Vec16 of a warp
  const i64 warps = kConsumers * 4, warp = i64(work.rest_block) * warps + thread.group * 4 + thread.warp;
  const i64 next = args.rest * warps * kPart;  // from one split to the next
  const u32 lane = threadIdx.x % 32;
  Vec16* to = args.partials + work.split * next + warp * kPart + lane;
#pragma unroll 4
  for (int four = 0; four < kDim / 8; ++four) to[four * 32] = own[four][lane];
  to[kDim / 8 * 32] = {{__float_as_uint(rows.m[0]), __float_as_uint(rows.m[1]), __float_as_uint(promoted.sum[0]),
                        __float_as_uint(promoted.sum[1])}};
  __syncwarp();
  u32 before = 0;
  if (lane == 0) before = atom_inc_acq_rel_gpu(args.arrivals + warp);
  if (__shfl_sync(0xFFFFFFFF, before, 0) + 1 < u32(args.key_splits)) return false;
  __syncwarp();  // (what the first lane has acquired, all have)

  const Vec16* from = args.partials + warp * kPart + lane;
  float m[2] = {-kInfinity, -kInfinity};
  for (i32 split = 0; split < args.key_splits; ++split) {
    const Vec16 its = ld_global_cg_v4(from + split * next + kDim / 8 * 32);
#pragma unroll
    for (int half = 0; half < 2; ++half) m[half] = max_nan_f32(m[half], __uint_as_float(its.word[half]));
  }
  float sum[2] = {};
  for (i32 split = 0; split < args.key_splits; ++split) {
    const Vec16 its = ld_global_cg_v4(from + split * next + kDim / 8 * 32);
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      factor[half] = power<true>(__uint_as_float(its.word[half]), m[half]);
      sum[half] = __fmaf_rn(__uint_as_float(its.word[2 + half]), factor[half], sum[half]);
    }
    constexpr int kAtOnce = 8;  // under way together: they are far away
#pragma unroll 1
    for (int first = 0; first < kDim / 8; first += kAtOnce) {
      Vec16 part[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) part[i] = ld_global_cg_v4(from + split * next + (first + i) * 32);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Vec16 all = {};
        if (split > 0) all = own[first + i][lane];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float sum = __fmaf_rn(__uint_as_float(part[i].word[j]), factor[j / 2], __uint_as_float(all.word[j]));
          all.word[j] = __float_as_uint(sum);
        }
        own[first + i][lane] = all;
      }
    }
  }
  if (lane == 0) args.arrivals[warp] = 0;  // (for the next launch on the same K and V)
#pragma unroll
  for (int half = 0; half < 2; ++half) rows.m[half] = m[half], promoted.sum[half] = sum[half];
  return true;
}
#endif
