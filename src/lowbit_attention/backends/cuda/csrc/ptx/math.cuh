// Arithmetic with the rounding and the treatment of NaN that C++ does not name.
#pragma once
#include "ptx/types.cuh"

#define kInfinity __int_as_float(0x7F800000)
#define kNaN __int_as_float(0x7FFFFFFF)

__device__ inline float ex2_approx_ftz_f32(float x) {  // 2^x, 2 ulp; 2^−inf = 0
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ inline float lg2_approx_ftz_f32(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ inline float rcp_approx_ftz_f32(float x) {  // 1 ulp
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
__device__ inline float max_nan_f32(float a, float b) {  // NaN if either is NaN, so a bad input shows
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ inline float min_nan_f32(float a, float b) {
  float out;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ inline float fma_rm_f32(float a, float b, float c) {  // rounded down
  float out;
  asm("fma.rm.f32 %0, %1, %2, %3;" : "=f"(out) : "f"(a), "f"(b), "f"(c));
  return out;
}
__device__ inline float sub_rm_f32(float a, float b) {
  float out;
  asm("sub.rm.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
__device__ inline float mul_rp_f32(float a, float b) {  // rounded up
  float out;
  asm("mul.rp.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}
// Two 16-bit numbers at a time.
__device__ inline u32 min_nan_f16x2(u32 a, u32 b) {
  u32 out;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 min_nan_bf16x2(u32 a, u32 b) {
  u32 out;
  asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 max_nan_f16x2(u32 a, u32 b) {
  u32 out;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 max_nan_bf16x2(u32 a, u32 b) {
  u32 out;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 mul_f16x2(u32 a, u32 b) {
  u32 out;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(out) : "r"(a), "r"(b));
  return out;
}
__device__ inline u32 fma_f16x2(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}
