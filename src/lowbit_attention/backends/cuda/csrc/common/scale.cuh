// Scales of a group of numbers: δ = max / largest and its inverse, each one correctly rounded division.
#pragma once
#include "ptx/convert.cuh"
#include "ptx/math.cuh"

constexpr float kTiny = 1.9259299443872359e-34f;  // 2^-112: below it 1 / δ overflows, and a group counts as zeros
constexpr float kLargestMean = 1.0141204801825835e31f;  // 2^103: |a − mean| then rounds to the largest float at most
constexpr float kLargestSmoothed = 8.507059173023462e37f;  // 2^126: |a − mean| ≤ 2 · max|a| must stay below 2^128

struct Scale {
  float delta, inverse;
};

__device__ inline Scale scale_of(float max_magnitude, float largest) {
  if (max_magnitude < kTiny) return {1.0f, 0.0f};
  if (!(max_magnitude < kInfinity)) return {kNaN, 0.0f};  // an input that is NaN or infinite must show
  return {__fdiv_rn(max_magnitude, largest), __fdiv_rn(largest, max_magnitude)};
}

// Whether a query row with this largest magnitude (NaN if a number is) is spoilt: it has a NaN or an infinity. It then is
// NaN in the output, counts in no mean and no scale, and is quantized as zeros: the rows beside it are not to see it.
__device__ inline bool is_spoilt(float max_magnitude) { return !(max_magnitude < kInfinity); }

__device__ inline float shuffle_max_nan(float x, int lanes) {  // over `lanes` neighbouring lanes, a power of two
#pragma unroll
  for (int step = 1; step < lanes; step *= 2) x = max_nan_f32(x, __shfl_xor_sync(0xFFFFFFFF, x, step));
  return x;
}

// Four numbers to four INT8 bytes, each rounded to the nearest even. |x · inverse| ≤ 127 (1 + 2⁻²³), which rounds to at
// most 127. Added to 1.5 · 2²³, a number leaves its integer in the sum's low bits: cheaper than a conversion.
__device__ inline u32 int8x4(float a, float b, float c, float d, float inverse) {
  const float x[4] = {__fmul_rn(a, inverse), __fmul_rn(b, inverse), __fmul_rn(c, inverse), __fmul_rn(d, inverse)};
  u32 bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(__fadd_rn(x[i], 12582912.0f));
  return prmt_b32(prmt_b32(bits[0], bits[1], 0x0040), prmt_b32(bits[2], bits[3], 0x0040), 0x5410);
}

// Four INT8 bytes of −8 … 7 to four INT4 nibbles, the first lowest.
__device__ inline u32 int4x4(u32 four) {
  const u32 low = four & 0x0F0F0F0F;     // 0d 0c 0b 0a
  const u32 pairs = low | low >> 4;      // .. dc .. ba in bytes 2 and 0
  return prmt_b32(pairs, 0, 0x4420) & 0xFFFF;
}
