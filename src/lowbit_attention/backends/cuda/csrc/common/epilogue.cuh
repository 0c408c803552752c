// Two neighbouring channels of the output, in the caller's type.
#pragma once
#include "tile/strided.cuh"

template <Dtype kDtype>
__device__ __forceinline__ void store_pair(void* out, i64 at, float a, float b) {
  if constexpr (kDtype == kFloat32) {
    *reinterpret_cast<Vec8*>(static_cast<float*>(out) + at) = {__float_as_uint(a), __float_as_uint(b)};
  } else {
    *reinterpret_cast<u32*>(static_cast<u16*>(out) + at) = kDtype == kFloat16 ? cvt_f16x2_f32(b, a) : cvt_bf16x2_f32(b, a);
  }
}

// Both in one register, numbers that are too large becoming the largest.
template <Dtype kDtype>
__device__ __forceinline__ u32 saturated_pair(float a, float b) {
  static_assert(kDtype != kFloat32, "two 16-bit channels");
  return kDtype == kFloat16 ? cvt_satfinite_f16x2_f32(b, a) : cvt_satfinite_bf16x2_f32(b, a);
}

template <Dtype kDtype>
constexpr float kLargest = kDtype == kFloat16 ? 65504.0f : kDtype == kBFloat16 ? 3.3895313892515355e38f : 3.4028234663852886e38f;
