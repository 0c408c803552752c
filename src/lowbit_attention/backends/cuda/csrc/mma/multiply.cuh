// The MMAs of the policies: INT8 or INT4, E4M3 or FP16, sums in FP32 or FP16.
#pragma once
#include "mma/block.cuh"
#include "ptx/convert.cuh"
#include "ptx/mma.cuh"

__device__ __forceinline__ void multiply_qk(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, const i32 (&c)[4]) {
#if QK_LANES == 4
  mma_m16n8k64_s32_s4(d, a, b0, b1, c);
#else
  mma_m16n8k32_s32_s8(d, a, b0, b1, c);
#endif
}

#if SUMS_F16
using Sums = u32[2];
#else
using Sums = float[4];
#endif
__device__ __forceinline__ void multiply_pv(Sums& d, const u32 (&a)[4], u32 b0, u32 b1, const Sums& c) {
#if V_HALF && SUMS_F16
  mma_m16n8k16_f16_f16(d, a, b0, b1, c);
#elif V_HALF
  mma_m16n8k16_f32_f16(d, a, b0, b1, c);
#elif SUMS_F16
  mma_m16n8k32_f16_e4m3(d, a, b0, b1, c);
#else
  mma_m16n8k32_f32_e4m3(d, a, b0, b1, c);
#endif
}
__device__ __forceinline__ float sum_of(const Sums& sums, int i) {
#if SUMS_F16
  return cvt_f32_f16(u16(i % 2 ? sums[i / 2] >> 16 : sums[i / 2]));
#else
  return sums[i];
#endif
}

constexpr int kPRegisters = 4 * kPvSteps;              // A fragments of P, of an m16 block
