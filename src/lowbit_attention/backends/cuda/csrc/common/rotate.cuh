// The orthonormal Hadamard rotation of a token's channels, in the order of additions of reference/rotation.py.
#pragma once
#include "ptx/math.cuh"

// Butterflies between numbers whose places differ in one bit: (a, b) becomes (a + b, a − b).
template <int kCount, int kStride>
__device__ __forceinline__ void butterflies(float (&x)[kCount]) {  // within a thread
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i & kStride) continue;
    const float a = x[i], b = x[i + kStride];
    x[i] = __fadd_rn(a, b), x[i + kStride] = __fsub_rn(a, b);
  }
}
template <int kCount>
__device__ __forceinline__ void butterflies_across(float (&x)[kCount], int lanes) {  // with the lane that far away
  const bool second = threadIdx.x & lanes;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float other = __shfl_xor_sync(0xFFFFFFFF, x[i], lanes);
    x[i] = second ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
  }
}

// Before: by 1 / size, so that no sum of `size` numbers overflows. After: by √size, saturated; NaN and ∞ stay.
template <int kSize, int kCount>
__device__ __forceinline__ void rotation_begins(float (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = __fmul_rn(x[i], 1.0f / kSize);
}
template <int kSize, int kCount>
__device__ __forceinline__ void rotation_ends(float (&x)[kCount]) {
  constexpr float kRoot = kSize == 64 ? 8.0f : 11.313708498984761f;
  constexpr float kLargest = 3.4028234663852886e38f;
  static_assert(kSize == 64 || kSize == 128, "the square root of its size is written here");
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float y = __fmul_rn(x[i], kRoot);
    x[i] = fabsf(x[i]) < kInfinity ? fminf(fmaxf(y, -kLargest), kLargest) : x[i];
  }
}
