// Conversions, one instruction a function. Saturating where the format has no infinity.
#pragma once
#include "ptx/types.cuh"

__device__ inline u16 cvt_e4m3x2_f32(float high, float low) {  // rounds to nearest even, saturates to ±448
  u16 out;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(out) : "f"(high), "f"(low));
  return out;
}
__device__ inline u16 cvt_e4m3x2_f16x2(u32 pair) {
  u16 out;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(out) : "r"(pair));
  return out;
}
__device__ inline u32 cvt_f16x2_f32(float high, float low) {
  u32 out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ inline u32 cvt_bf16x2_f32(float high, float low) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ inline u32 cvt_satfinite_f16x2_f32(float high, float low) {
  u32 out;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ inline u32 cvt_satfinite_bf16x2_f32(float high, float low) {
  u32 out;
  asm("cvt.rn.satfinite.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ inline float cvt_f32_f16(u16 half) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(half));
  return out;
}
__device__ inline u32 prmt_b32(u32 a, u32 b, u32 selector) {  // each nibble of the selector picks one of eight bytes
  u32 out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}
__device__ inline u32 mov_b32_u16x2(u16 high, u16 low) {  // unlike a shift and an or, free behind a conversion to E4M3
  u32 out;
  asm("mov.b32 %0, {%1, %2};" : "=r"(out) : "h"(low), "h"(high));
  return out;
}
