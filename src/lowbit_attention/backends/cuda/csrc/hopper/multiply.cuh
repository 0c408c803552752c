// A warpgroup's MMAs: the scores, P·V and its sums, in the two formats.
#pragma once
#include "hopper/block.cuh"
#include "ptx/barrier.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"
#include "ptx/wgmma.cuh"

// P·V of 32 keys, by the columns that the sums have.
template <int kRegisters>
__device__ __forceinline__ void multiply_pv(u32 (&sums)[kRegisters], const u32 (&p)[4], u64 v, bool accumulate) {
  constexpr int kWide = 4 * kRegisters;
  static_assert(kWide == 64 || kWide == 72 || kWide == 128 || kWide == 136, "no such MMA in ptx/wgmma.cuh");
  if constexpr (kWide == 64) wgmma_m64n64k32_f16_e4m3_rs(sums, p, v, accumulate);
  if constexpr (kWide == 72) wgmma_m64n72k32_f16_e4m3_rs(sums, p, v, accumulate);
  if constexpr (kWide == 128) wgmma_m64n128k32_f16_e4m3_rs(sums, p, v, accumulate);
  if constexpr (kWide == 136) wgmma_m64n136k32_f16_e4m3_rs(sums, p, v, accumulate);
}
template <int kRegisters>
__device__ __forceinline__ void multiply_pv(float (&sums)[kRegisters], const u32 (&p)[4], u64 v, bool accumulate) {
  constexpr int kWide = 2 * kRegisters;
  static_assert(kWide == 64 || kWide == 72 || kWide == 128 || kWide == 136, "no such MMA in ptx/wgmma.cuh");
  if constexpr (kWide == 64) wgmma_m64n64k32_f32_e4m3_rs(sums, p, v, accumulate);
  if constexpr (kWide == 72) wgmma_m64n72k32_f32_e4m3_rs(sums, p, v, accumulate);
  if constexpr (kWide == 128) wgmma_m64n128k32_f32_e4m3_rs(sums, p, v, accumulate);
  if constexpr (kWide == 136) wgmma_m64n136k32_f32_e4m3_rs(sums, p, v, accumulate);
}

#if SUMS_F16
using Sums = u32[kColumns / 4];  // two FP16 sums a register: row half r % 2, channels 8 · (r / 2) + 2q and + 1
__device__ __forceinline__ float sum_of(const Sums& sums, int i) {
  const u32 pair = sums[i / 4 * 2 + i / 2 % 2];
  return cvt_f32_f16(u16(i % 2 ? pair >> 16 : pair));
}
__device__ __forceinline__ void rescale_sums(Sums& sums, const float (&factor)[2]) {
  const u32 pair[2] = {cvt_f16x2_f32(factor[0], factor[0]), cvt_f16x2_f32(factor[1], factor[1])};
#pragma unroll
  for (int r = 0; r < kColumns / 4; ++r) sums[r] = mul_f16x2(sums[r], pair[r % 2]);
}
#else
using Sums = float[kColumns / 2];
__device__ __forceinline__ float sum_of(const Sums& sums, int i) { return sums[i]; }
__device__ __forceinline__ void rescale_sums(Sums& sums, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) sums[i] *= factor[i / 2 % 2];
}
#endif

// S = Q·Kᵀ of 128 keys (64 scores a thread) or of 64.
template <int kCount>
__device__ __forceinline__ void begin_qk(i32 (&scores)[kCount], u64 q, u64 k) {
  pin_registers(scores);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    if constexpr (kCount == 64) {
      wgmma_m64n128k32_s32_s8_ss(scores, q + i * kDescriptorStep, k + i * kDescriptorStep, i > 0);
    } else {
      wgmma_m64n64k32_s32_s8_ss(scores, q + i * kDescriptorStep, k + i * kDescriptorStep, i > 0);
    }
  }
  wgmma_commit_group();
}

// P·V of a tile, or a part of it: of half the keys, or into half the channels' sums.
template <int kPart>
__device__ __forceinline__ void begin_pv(Sums& sums, u32 (&p)[16], u64 v, bool accumulate) {
  constexpr int kSteps = kTileKeys / 32, kFirst = kPromotesHalves && kPart == 1 ? kSteps / 2 : 0;
  constexpr int kEnd = kPromotesHalves && kPart == 0 ? kSteps / 2 : kSteps;
  pin_registers(p);
  pin_registers(sums);
  wgmma_fence();
#pragma unroll
  for (int i = kFirst; i < kEnd; ++i) {
    const u32(&four)[4] = reinterpret_cast<const u32(&)[4]>(p[4 * i]);
    if constexpr (kSplitsChannels && kPart == 0) {  // (the columns of ones are in the other part)
      multiply_pv(reinterpret_cast<float(&)[kDim / 4]>(sums), four, v + i * kDescriptorStep, accumulate || i > kFirst);
    } else {
      multiply_pv(sums, four, v + i * kDescriptorStep, accumulate || i > kFirst);
    }
  }
  wgmma_commit_group();
}

#if TILE_MEANS
// The rows of ones behind a stage's V: all keys of a tile count in the column of its number mod kOnes. The copies bring
// them, eight rows of these from row kOnes − 1 − column on.
struct alignas(128) OnesRows {
  u32 word[(2 * kOnes - 1) * kTileKeys / 4];
  __device__ constexpr OnesRows() : word() {
    for (int i = 0; i < kTileKeys / 4; ++i) word[(kOnes - 1) * kTileKeys / 4 + i] = 0x38383838;  // E4M3
  }
};
__device__ constexpr OnesRows kOnesRows;
constexpr int kOnesBytes = kOnes * kTileKeys;
__device__ __forceinline__ const u32* ones_of_tile(u32 tile) {
  return kOnesRows.word + (kOnes - 1 - tile % kOnes) * (kTileKeys / 4);
}

// Before any copy: a number that no tile has brought is multiplied with 0.
__device__ __forceinline__ void clear_tile_means(Shared& shared) {
  u32* words = reinterpret_cast<u32*>(shared.tile_means);
  for (int i = threadIdx.x; i < int(sizeof(shared.tile_means) / 4); i += kThreads) words[i] = 0;
  fence_proxy_async();
}
#elif SUM_IN_MMA
// The rows of ones behind every stage's V, which copies never touch. Each counts every eighth word of keys, as
// `row_sum_column` of machine.py says.
__device__ __forceinline__ void write_ones(Shared& shared) {
  constexpr u32 kFourOnes = 0x38383838;  // E4M3
  constexpr int kWords = kTileKeys / 4;
  for (int i = threadIdx.x; i < kStages * kOnes * kWords; i += kThreads) {
    const int stage = i / (kOnes * kWords), row = i / kWords % kOnes, word = i % kWords;
    const int at = kTileBytes + swizzled<kTileKeys>(row, word / 4) + word % 4 * 4;
    *reinterpret_cast<u32*>(shared.v[stage] + at) = word % kOnes == row ? kFourOnes : 0;
  }
  fence_proxy_async();
}
#endif

// The last eight columns are P · ones, the keys shared among them: a thread has two of them for each of its rows.
__device__ __forceinline__ float row_sum(const Sums& sums, int half) {
  constexpr int kFirst = kColumns / 2 - 4;
  return sum_of(sums, kFirst + 2 * half) + sum_of(sums, kFirst + 2 * half + 1);
}
