// The online softmax of one thread's part of a score tile, in base 2.
//
// A thread of a quad (q = lane % 4) holds of its two rows (half 0 and 1) the keys 8i + 2q and 8i + 2q + 1 of a tile:
// exactly the keys that share a K scale, and the rows share a Q scale. So one factor turns all its integer scores into
// logits x = s · factor.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

constexpr i32 kHidden = -2147483647 - 1;  // a score that causality or the sequence's end hides

// s + kMagicBits, read as a float, is s + kMagic exactly while |s| < 2^22; an INT8 dot product of 128 channels stays
// below 127 · 127 · 128 < 2^21. The FMA that scales s takes kMagic · factor away again, so no conversion is needed.
constexpr i32 kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;  // 1.5 · 2^23
constexpr float kLargestFactor = 1.2676506e30f;  // 2^100, so that kMagic · factor stays finite

struct Rows {          // state of a thread's two rows
  float m[2];          // what is subtracted: the running maximum of x, −∞ before the first key
  float sum[2];        // this thread's share of Σ P
};

// Which keys a row sees in a tile: those up to last[half], counted from this thread's first key.
struct Visible {
  i32 last[2];
};

// Turns scores into P in E4M3 (`p`, the FP8 MMA's A fragments) and returns, by half, what older sums are to be
// multiplied with. `scores` is used up.
template <bool kMasked>
__device__ __forceinline__ void softmax(i32 (&scores)[64], u32 (&p)[16], Rows& rows, float (&rescale)[2], float factor,
                                        float log2_p_max, const Visible& visible) {
  i32 top[2] = {kHidden, kHidden};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int half = i / 2 % 2;
    if constexpr (kMasked) {
      if (i / 4 * 8 + i % 2 > visible.last[half]) scores[i] = kHidden;
    }
    top[half] = max(top[half], scores[i]);
  }
  factor = min_nan_f32(factor, kLargestFactor);
  float base[2];  // added to s · factor: log2 P_r − m
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // m is rounded up and the base down, so that P never exceeds P_r, by the rounding of kMagic · factor either: that
    // is less than one unit of s, far below the rounding of Q and K
    float m = mul_rp_f32(float(top[half]), factor);
    if (kMasked && top[half] == kHidden) m = -kInfinity;
    m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 1));
    m = fmaxf(m, __shfl_xor_sync(0xFFFFFFFF, m, 2));
    m = fmaxf(m, rows.m[half]);
    const float subtracted = kMasked && m == -kInfinity ? 0.0f : m;
    rescale[half] = ex2_approx_ftz_f32(rows.m[half] - subtracted);
    rows.m[half] = m;
    rows.sum[half] *= rescale[half];
    base[half] = fma_rm_f32(-kMagic, factor, sub_rm_f32(log2_p_max, subtracted));
  }
#pragma unroll
  for (int group = 0; group < 8; ++group) {  // 16 keys
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const i32 s = scores[8 * group + 2 * half + i % 2 + i / 2 * 4];
        float x = __fmaf_rn(__int_as_float(s + kMagicBits), factor, base[half]);
        if (kMasked && s == kHidden) x = -kInfinity;
        e[i] = ex2_approx_ftz_f32(x);
      }
      rows.sum[half] += (e[0] + e[1]) + (e[2] + e[3]);
      p[2 * group + half] = u32(cvt_e4m3x2_f32(e[1], e[0])) | u32(cvt_e4m3x2_f32(e[3], e[2])) << 16;
    }
  }
}
