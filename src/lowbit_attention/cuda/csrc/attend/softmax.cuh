// The online softmax of one thread's part of a score tile, in base 2.
//
// A thread of a quad (q = lane % 4) holds of its two rows (half 0 and 1) the keys 8i + 2q and 8i + 2q + 1 of a tile:
// exactly the keys that share a K scale, and the rows share a Q scale. So one factor turns all its integer scores into
// logits x = s · factor.
#pragma once
#include "ptx/barrier.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

constexpr i32 kHidden = -2147483647 - 1;  // a score that causality or the sequence's end hides

// s + kMagicBits, read as a float, is s + kMagic exactly while |s| < 2^22; an INT8 dot product of 128 channels stays
// below 127 · 127 · 128 < 2^21. The FMA that scales s takes kMagic · factor away again, so no conversion is needed.
// That rounds the exponent by up to two units of s, which is far below the rounding of Q and K, but must itself stay
// small beside log2 P_r: larger factors (logits of thousands) take the careful way, a conversion and two roundings.
constexpr i32 kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;            // 1.5 · 2^23
constexpr float kLargestFastFactor = 0.0625f;    // P is at most 8 % too small, and the lse sees it
constexpr float kLargestFactor = 1.2676506e30f;  // 2^100, so that 2^21 · factor stays finite

struct Visible {  // which keys a row sees: those up to last[half], counted from this thread's first key
  i32 last[2];
};

// This thread's largest logit of each row, −∞ if all are hidden; hidden scores become kHidden.
template <bool kMasked>
__device__ __forceinline__ void largest_logit(i32 (&scores)[64], float factor, const Visible& visible, float (&m)[2]) {
  i32 top[2] = {kHidden, kHidden};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int half = i / 2 % 2;
    i32& s = scores[i];
    if constexpr (kMasked) {
      if (i / 4 * 8 + i % 2 > visible.last[half]) s = kHidden;
    }
    top[half] = max(top[half], s);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // no smaller than any x, and the exponentials' base is rounded down, so that P never exceeds P_r
    m[half] = kMasked ? __fmul_rn(float(top[half]), factor) : mul_rp_f32(float(top[half]), factor);
    if (kMasked && top[half] == kHidden) m[half] = -kInfinity;
  }
}

// The maximum over a quad, in two exchanges that the caller may put other work between.
__device__ __forceinline__ void exchange(const float (&m)[2], float (&other)[2], int lane_mask) {
#pragma unroll
  for (int half = 0; half < 2; ++half) other[half] = __shfl_xor_sync(0xFFFFFFFF, m[half], lane_mask);
}
__device__ __forceinline__ void exchange_again(float (&m)[2], float (&other)[2], int lane_mask) {
#pragma unroll
  for (int half = 0; half < 2; ++half) m[half] = max_nan_f32(m[half], other[half]);
  exchange(m, other, lane_mask);
}

struct Change {
  float old_m[2];  // what was subtracted before this tile
  bool moved;      // in this warp, some row's m grew within its interval
};

// 2^(old − m), 0 where nothing was summed yet.
template <bool kMasked>
__device__ __forceinline__ float power(float old, float m) {
  return ex2_approx_ftz_f32(old - (kMasked && m == -kInfinity ? 0.0f : m));
}

struct Rows {      // state of a thread's two rows
  float m[2];      // what is subtracted in the present interval, −∞ before the first key
  float seen[2];   // the maximum of all keys so far
  float out_m[2];  // what was subtracted in the interval that was promoted last
  float sum[2];    // Σ P: this thread's share, or that of the promoted intervals

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int half = 0; half < 2; ++half) m[half] = seen[half] = out_m[half] = -kInfinity, sum[half] = 0.0f;
  }

  // Fixes m for a tile whose maximum is that of `a` and `b`. `fresh`: an interval begins.
  template <bool kMasked, bool kRestart>
  __device__ __forceinline__ void update(Change& change, const float (&a)[2], const float (&b)[2], bool fresh,
                                         float slack, float headroom) {
    bool moved = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float top = max_nan_f32(a[half], b[half]);  // (NaN goes on, to be seen)
      change.old_m[half] = m[half];
      const float larger = max_nan_f32(m[half], top);
      if constexpr (kRestart) {
        seen[half] = max_nan_f32(seen[half], top);
        m[half] = fresh ? max_nan_f32(seen[half] - slack, min_nan_f32(seen[half], top + headroom)) : larger;
      } else {
        m[half] = larger;
      }
      moved |= larger > change.old_m[half];
    }
    change.moved = __any_sync(0xFFFFFFFF, moved) && !(kRestart && fresh);
  }

  // What sums with the old m are to be multiplied with.
  template <bool kMasked>
  __device__ __forceinline__ void rescale(const Change& change, float (&scale)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = power<kMasked>(change.old_m[half], m[half]);
  }

  // What O is to be multiplied with when the sums of the interval that ended are added.
  template <bool kMasked>
  __device__ __forceinline__ void promotion(const Change& change, float (&scale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = power<kMasked>(out_m[half], change.old_m[half]);
      out_m[half] = change.old_m[half];
    }
  }
  __device__ __forceinline__ void last_promotion(float (&scale)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = power<true>(out_m[half], m[half]);
  }
};

// Turns a tile's scores into P in E4M3 (`p`, the FP8 MMA's A fragments); with kSums, adds Σ P before rounding.
//
// A warp's exponentials begin 8 clocks apart at best and come back some 30 later. So the conversions of four follow four
// exponentials later; the assembler finds the rest of the order by itself.
template <bool kMasked, bool kSums>
__device__ __forceinline__ void exponentials(const i32 (&scores)[64], u32 (&p)[16], Rows& rows, float factor,
                                             float log2_p_max) {
  float base[2];  // added to s · factor: log2 P_r − m
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float subtracted = kMasked && rows.m[half] == -kInfinity ? 0.0f : rows.m[half];
    base[half] = sub_rm_f32(log2_p_max, subtracted);
    if (!kMasked) base[half] = fma_rm_f32(-kMagic, factor, base[half]);
  }
  constexpr int kGroups = 16, kSize = 4;  // a group's four become one register of P
  float x[kGroups][kSize];
#pragma unroll
  for (int step = 0; step < kGroups + 2; ++step) {
    if (step < kGroups) {
      const int half = step % 2;
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        const i32 s = scores[8 * (step / 2) + 2 * half + i % 2 + i / 2 * 4];
        if constexpr (kMasked) {  // 0 + log2 P_r, rounded down, at the maximum, however large that is
          x[step][i] = s == kHidden ? -kInfinity : __fmul_rn(float(s), factor) + base[half];
        } else {
          x[step][i] = __fmaf_rn(__int_as_float(s + kMagicBits), factor, base[half]);
        }
      }
    }
    if (step >= 1 && step <= kGroups) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) x[step - 1][i] = ex2_approx_ftz_f32(x[step - 1][i]);
    }
    if (step >= 2) {
      const float(&e)[kSize] = x[step - 2];
      if (kSums) rows.sum[step % 2] += (e[0] + e[1]) + (e[2] + e[3]);
      p[step - 2] = u32(cvt_e4m3x2_f32(e[1], e[0])) | u32(cvt_e4m3x2_f32(e[3], e[2])) << 16;
    }
  }
}
