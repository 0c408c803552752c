// The online softmax of one thread's part of a score tile, in base 2.
//
// A thread of a quad (q: lane_in_quad) holds of its two rows (half 0 and 1) the keys 8i + 2q and 8i + 2q + 1 of a tile:
// exactly the keys that share a K scale, and the rows share a Q scale. So one factor turns all its integer scores into
// logits x = s · factor.
#pragma once
#include "common/masks.cuh"
#include "ptx/barrier.cuh"
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

// s + kMagicBits, read as a float, is s + kMagic exactly while |s| < 2^22; an INT8 dot product of 128 channels stays
// below 127 · 127 · 128 < 2^21. The FMA that scales s takes kMagic · factor away again, so no conversion is needed.
// That rounds the exponent by up to two units of s, which is far below the rounding of Q and K, but must itself stay
// small beside log2 P_r: larger factors (logits of thousands) take the exact path: a conversion and two roundings.
constexpr i32 kMagicBits = 0x4B400000;
constexpr float kMagic = 12582912.0f;            // 1.5 · 2^23
// A score that is hidden, below all others. With bits, whose tiles take the fast path, it is −∞ once kMagicBits is added.
constexpr i32 kHidden = MASK_BITS ? 0xFF800000 - kMagicBits : -2147483647 - 1;
constexpr float kLargestFastFactor = 0.0625f;    // P is at most 8 % too small, and the lse sees it
[[maybe_unused]] constexpr float kSmallestFactor = 0x1p-90f;
constexpr float kLargestFactor = 1.2676506e30f;  // 2^100, so that 2^21 · factor stays finite

// Which tiles look for hidden scores: those on the exact path and, with bits, all.
template <bool kMasked>
constexpr bool kHides = kMasked || MASK_BITS;

// The factor of keys one of which is NaN is NaN, and so is the maximum of a row that sees one of these keys. That of a row
// from which all of them are hidden is not: their exponentials may not be NaN either. (Nor 0 · −∞.)
__device__ __forceinline__ float without_nan(float factor) { return LISTS_TILES ? fmaxf(factor, kSmallestFactor) : factor; }

// This thread's largest logit of each row, −∞ if all are hidden; hidden scores become kHidden.
#if MASK_BIAS  // Scores become logits. (The fast path's arithmetic saves little here, and takes registers.)
template <bool kMasked>
__device__ __forceinline__ void largest_logit(i32 (&scores)[64], float factor, const Visible& visible, float (&m)[2]) {
  const float clean = without_nan(factor);
  m[0] = m[1] = -kInfinity;
#pragma unroll
  for (int part = 0; part < kWordKeys / kBiasRun; ++part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Vec8 four = *reinterpret_cast<const Vec8*>(visible.bias + half * kNextBiasRow + part * kNextRun);
#pragma unroll
      for (int j = 0; j < kBiasRun; ++j) {
        i32& s = scores[2 * kBiasRun * part + j / 2 * 4 + 2 * half + j % 2];
        const u32 pair = four.word[j / 2];
        const float x = __fmaf_rn(float(s), clean, cvt_f32_f16(u16(j % 2 ? pair >> 16 : pair)));
        s = __float_as_int(x);
        m[half] = fmaxf(m[half], x);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (factor != factor && m[half] != -kInfinity) m[half] = factor;  // (NaN goes on)
  }
}
#else
template <bool kMasked>
__device__ __forceinline__ void largest_logit(i32 (&scores)[64], float factor, const Visible& visible, float (&m)[2]) {
  i32 top[2] = {kHidden, kHidden};
#if MASK_BITS  // (most masks leave most tiles alone)
  if (kLacksRegisters || __any_sync(0xFFFFFFFF, (visible.bits[0] & visible.bits[1]) != 0xFFFFFFFF)) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int key = 0; key < 32; ++key) {
        i32& s = scores[key / 2 * 4 + half * 2 + key % 2];
        s = visible.bits[half] & 1u << key ? s : kHidden;
      }
    }
  }
#endif
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int half = i / 2 % 2;
    i32& s = scores[i];
    if constexpr (kMasked && !MASK_BITS) {
      if (visible.hides(i)) s = kHidden;
    }
    top[half] = max(top[half], s);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // no smaller than any x, and the exponentials' base is rounded down, so that P never exceeds P_r
    m[half] = kMasked ? __fmul_rn(float(top[half]), factor) : mul_rp_f32(float(top[half]), factor);
    if (kHides<kMasked> && top[half] == kHidden) m[half] = -kInfinity;
  }
}

#endif

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
  return ex2_approx_ftz_f32(old - (kHides<kMasked> && m == -kInfinity ? 0.0f : m));
}

struct Rows {  // what every tile asks of a thread's two rows
  float m[2];  // what is subtracted in the present interval, −∞ before the first key

  // Fixes m for a tile whose maximum is that of `a` and `b`. `fresh`: an interval begins. `seen`: see Promoted.
  template <bool kRestart>
  __device__ __forceinline__ void update(Change& change, float (&seen)[2], const float (&a)[2], const float (&b)[2],
                                         bool fresh, float slack, float headroom) {
    bool moved = false;
    float top[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = max_nan_f32(a[half], b[half]);  // (NaN goes on, to be seen)
      change.old_m[half] = m[half];
      m[half] = max_nan_f32(m[half], top[half]);
      moved |= m[half] > change.old_m[half];
    }
    if (kRestart && fresh) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // (m is never above the maximum of all keys so far, nor below that of its interval's)
        seen[half] = max_nan_f32(seen[half], change.old_m[half]);
        const float all = max_nan_f32(seen[half], top[half]);
        m[half] = max_nan_f32(all - slack, min_nan_f32(all, top[half] + headroom));
      }
    }
    change.moved = __any_sync(0xFFFFFFFF, moved) && !(kRestart && fresh);
  }

  // The same where tiles may jump. `alone`: whether the last tile has, whose interval was its own; then whether this one
  // has. `level`: what was subtracted before the last tile. `first`: it jumps from nothing.
  template <class Args>
  __device__ __forceinline__ void update_jumping(Change& change, float (&seen)[2], const float (&level)[2],
                                                 const float (&a)[2], const float (&b)[2], bool& begins, bool& alone,
                                                 bool first, const Args& args) {
    float top[2], rise = -kInfinity;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = max_nan_f32(a[half], b[half]);
      change.old_m[half] = m[half];
      rise = fmaxf(rise, top[half] - m[half]);  // (NaN counts for nothing)
    }
    change.moved = __any_sync(0xFFFFFFFF, rise > 0.0f);
    if (alone) rise = fmaxf(top[0] - level[0], top[1] - level[1]);  // (two sinks in neighbouring tiles)
    const bool jumps = __all_sync(0xFFFFFFFF, rise > args.jump) || first;
    begins = begins || alone || jumps;
    alone = jumps && !first;
    if (begins) {
      change.moved = false;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float all = max_nan_f32(max_nan_f32(seen[half], m[half]), top[half]);
        seen[half] = all;
        const float others = all <= top[half] + args.headroom ? all : top[half];
        m[half] = max_nan_f32(all - args.slack, jumps ? top[half] - args.jump_bits : others);
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) m[half] = max_nan_f32(m[half], top[half]);
    }
  }

  // What sums with the old m are to be multiplied with.
  template <bool kMasked>
  __device__ __forceinline__ void rescale(const Change& change, float (&scale)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = power<kMasked>(change.old_m[half], m[half]);
  }
};

struct Promoted {  // what is known of those rows' intervals that were promoted
  float seen[2];   // the maximum of their keys
  float m[2];      // what was subtracted in the last of them
  float sum[2];    // Σ P (in the running one, too, where it is no sum of the MMA: this thread's share)

  __device__ __forceinline__ void reset() {
#pragma unroll
    for (int half = 0; half < 2; ++half) seen[half] = m[half] = -kInfinity, sum[half] = 0.0f;
  }

  // What O is to be multiplied with when the sums of an interval are added, from which `its_m` was subtracted.
  template <bool kMasked>
  __device__ __forceinline__ void promote(const float (&its_m)[2], float (&scale)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = power<kMasked>(m[half], its_m[half]);
      m[half] = its_m[half];
    }
  }
};

// ---- polynomial exp2: 2^x of two numbers on the FMA units, to 0.6 %, with as many errors above as below, for some keys where
// the unit for exponentials is what a tile waits for. `y` is x + 15 as kPowerMagic + y, which rounds it to 2⁻¹⁰.
//
// Read as FP16, y's last 16 bits are 2^n · (1 + f) for x = n + f, which is right where f = 0 and 6 % too large at most.
// 2^f / (1 + f) is nearly a parabola of f. The bits below the exponent alone are f · 2⁻¹⁴. x may not be below −15.
constexpr float kPowerMagic = 12288.0f;          // 1.5 · 2^13: FP32 numbers from there on count 2⁻¹⁰
constexpr i32 kPowerMagicBits = 0x46400000;
constexpr float kPowerBias = kPowerMagic + 15.0f;  // 15: FP16's exponent's
// Scores are raised to that of x = −14, so that what rounding does to it keeps away from −15: P of either is 0 in E4M3. (With
// factors from kSmallestFactor to kLargestFastFactor, |m| ≤ 2^20 / 16, so that score is finite, and its product with the
// factor and m, 2^16 and rounded to 24 bits each, cancel but for less than .02. Logits of smaller factors are below 2^−70.)
constexpr float kLowestExponent = -14.0f;
__device__ __forceinline__ u32 polynomial_exp2(float y0, float y1) {
  constexpr u32 kFraction = 0x03FF03FF;
  constexpr u32 kScale = 0x6FC86FC8, kShift = 0xB376B376, kRest = 0x3B883B88;  // 7968, −0.23315, 0.94141
  const u32 bits = prmt_b32(__float_as_uint(y0), __float_as_uint(y1), 0x5410), f = fma_f16x2(bits & kFraction, kScale, kShift);
  return mul_f16x2(bits, fma_f16x2(f, f, kRest));
}

// Which scores of a thread's are a polynomial's: every fourth 16 keys', a group being four registers of scores.
__device__ constexpr bool is_polynomial(int group) { return group / 2 % 4 == 3; }

// Turns a tile's scores into P in E4M3 (`p`, the FP8 MMA's A fragments). `Path` says how:
//   kMasked      the exact path: scores may be hidden, or their factor is large
//   kSums        Σ P before rounding is added to `sum`
//   kPolynomial  the keys of is_polynomial take polynomial_exp2
//   kHidesLast   hidden scores are looked for behind the arithmetic of the exact path, else before it: this decides how the
//                assembler allocates registers for all other tiles
//
// A pipeline of three steps, so that the conversions of a group follow four exponentials later: a warp's exponentials
// begin 8 clocks apart at best and come back some 30 later. The assembler finds the rest of the order by itself.
template <class Path>
__device__ __forceinline__ void exponentials(const i32 (&scores)[64], u32 (&p)[16], const Rows& rows, float (&sum)[2],
                                             float factor, float log2_p_max) {
  constexpr bool kMasked = Path::kMasked;
  static_assert(!Path::kPolynomial || (!Path::kSums && !Path::kHidesLast),
                "sums are those of FP32 numbers, and hidden scores give −∞ first");
  const float inverse = rcp_approx_ftz_f32(factor);
  i32 lowest[2];                      // s + kMagicBits of that exponent
  float base[2], polynomial_base[2];  // added to s · factor: log2 P_r − m
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float subtracted = kHides<kMasked> && rows.m[half] == -kInfinity ? 0.0f : rows.m[half];
    base[half] = sub_rm_f32(log2_p_max, subtracted);
    lowest[half] = __float_as_int(__fmaf_rn(kLowestExponent - base[half], inverse, kMagic));
    polynomial_base[half] = fma_rm_f32(-kMagic, factor, base[half] + kPowerBias);
    if (!kMasked) base[half] = fma_rm_f32(-kMagic, factor, base[half]);
  }
  constexpr int kGroups = 16, kSize = 4;  // a group's four become one register of P
  float x[kGroups][kSize];
  const auto polynomial = [](int group) { return Path::kPolynomial && is_polynomial(group); };

  const auto set_exponent = [&](float& to, i32 s, int half, bool by_polynomial) {
#if MASK_BIAS  // (whose scores are logits by now)
    to = __int_as_float(s) + base[half];
    if (by_polynomial) to += kPowerBias;
    if (by_polynomial) to = __int_as_float(max(__float_as_int(to), kPowerMagicBits));  // (−∞ too; NaN stays)
#else
    if constexpr (kMasked) {  // 0 + log2 P_r, rounded down, at the maximum, however large that is
      const bool hidden = s == kHidden;
      to = hidden && !Path::kHidesLast ? -kInfinity : __fmul_rn(float(s), factor) + base[half];
      if (by_polynomial && !hidden) {
        const float fast = __fmaf_rn(__int_as_float(s + kMagicBits), factor, polynomial_base[half]);
        to = factor <= kLargestFastFactor ? fast : to + kPowerBias;
      }
      if (by_polynomial) to = __int_as_float(max(__float_as_int(to), kPowerMagicBits));  // (−∞ too; NaN stays)
      if (hidden && Path::kHidesLast) to = -kInfinity;
    } else {
      const i32 with_magic = by_polynomial ? max(s + kMagicBits, lowest[half]) : s + kMagicBits;
      to = __fmaf_rn(__int_as_float(with_magic), factor, by_polynomial ? polynomial_base[half] : base[half]);
    }
#endif
  };
  const auto scale = [&](int group) {  // scores to exponents
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const i32 s = scores[8 * (group / 2) + 2 * (group % 2) + i % 2 + i / 2 * 4];
      set_exponent(x[group][i], s, group % 2, polynomial(group));
    }
  };
  const auto exponentiate = [&](int group) {
    if (polynomial(group)) return;  // (when they are rounded)
#pragma unroll
    for (int i = 0; i < kSize; ++i) x[group][i] = ex2_approx_ftz_f32(x[group][i]);
  };
  const auto round = [&](int group) {  // and add up
    const float(&e)[kSize] = x[group];
    if (Path::kSums) sum[group % 2] += (e[0] + e[1]) + (e[2] + e[3]);
    if (polynomial(group)) {
      const u32 low = polynomial_exp2(e[0], e[1]), high = polynomial_exp2(e[2], e[3]);
      p[group] = u32(cvt_e4m3x2_f16x2(low)) | u32(cvt_e4m3x2_f16x2(high)) << 16;
    } else {
      p[group] = u32(cvt_e4m3x2_f32(e[1], e[0])) | u32(cvt_e4m3x2_f32(e[3], e[2])) << 16;
    }
  };
#pragma unroll
  for (int step = 0; step < kGroups + 2; ++step) {
    if (step < kGroups) scale(step);
    if (step >= 1 && step <= kGroups) exponentiate(step - 1);
    if (step >= 2) round(step - 2);
  }
}
