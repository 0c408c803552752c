// Warps quantize rows of Q for the MMA: rows r and r + 8 of a warp's 16 share a scale.
#pragma once
#include "common/scale.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

// Where warpgroups of 64 rows find their Q: tiles as wgmma wants them, δ · logits_scale of a warp's eight pairs of rows,
// sm_scale · q · mean, and which rows of a pair are spoilt (1: the first, 2: the second).
template <int kDim>
struct QuantizedRows {
  u8 (*tile)[64 * kDim];
  float (*scale)[4][8];
  float (*mean_logit)[64];
  u8 (*spoilt)[4][8];
};

// Rows [0, rows) of the head at `base`, by `kWarps` warps of which this is number `warp`; what is left of the last
// warpgroup's 64 rows becomes zeros, and so do rows that see no key (`sees`). `kLanes` lanes share a pair of rows: the more, the fewer registers and the more steps.
template <Dtype kDtype, int kDim, int kWarps, int kLanes, class Seen>
__device__ void quantize_rows(const Strided& q, i64 base, i32 rows, i32 channels, float sm_scale, float logits_scale,
                              const float* mean, int warp, const Seen& sees, const QuantizedRows<kDim>& out) {
  constexpr int kChunks = kDim / kChunk / kLanes;  // chunks of 8 channels that a lane has of a row
  constexpr int kPairs = 32 / kLanes;              // that a warp takes in a step
  const int lane = threadIdx.x % 32, lane_of_row = lane % kLanes;
  const int steps = (rows + 63) / 64 * (32 / kPairs);
#pragma unroll 1
  for (int step = warp; step < steps; step += kWarps) {
    const int pair = step * kPairs + lane / kLanes, first = pair / 8 * 16 + pair % 8;
    Raw<kDtype> x[2][kChunks];
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const int row = first + 8 * (i / kChunks), channel = (i % kChunks * kLanes + lane_of_row) * kChunk;
      x[i / kChunks][i % kChunks] = zero_raw<kDtype>();
      if (row < rows && channel < channels && sees(row)) {
        x[i / kChunks][i % kChunks] = load_raw<kDtype>(q, base + i64(row) * q.token, channel);
      }
    }
    float largest[2] = {};
#pragma unroll
    for (int i = 0; i < 2 * kChunks * kChunk; ++i) {
      const Raw<kDtype>& raw = x[i / (kChunks * kChunk)][i / kChunk % kChunks];
      float& top = largest[i / (kChunks * kChunk)];
      top = max_nan_f32(top, fabsf(to_float<kDtype>(raw, i % kChunk)));
    }
    u32 spoilt = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = shuffle_max_nan(largest[half], kLanes);
      if (!is_spoilt(largest[half])) continue;
      spoilt |= 1 << half, largest[half] = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) x[half][i] = zero_raw<kDtype>();
    }
    const Scale scale = scale_of(fmaxf(largest[0], largest[1]), 127.0f);
    const float inverse = sm_scale < 0 ? -scale.inverse : scale.inverse;
    const int group = first / 64, row = first % 64;
    if (lane_of_row == 0) {
      out.scale[group][row / 16][row % 8] = __fmul_rn(scale.delta, logits_scale);
      out.spoilt[group][row / 16][row % 8] = u8(spoilt);
    }
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const Raw<kDtype>& raw = x[i / kChunks][i % kChunks];
      const int chunk = i % kChunks * kLanes + lane_of_row;
      float y[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) y[c] = to_float<kDtype>(raw, c);
      *reinterpret_cast<Vec8*>(out.tile[group] + swizzled<kDim>(row + 8 * (i / kChunks), chunk / 2) + chunk % 2 * 8) = {
          int8x4(y[0], y[1], y[2], y[3], inverse), int8x4(y[4], y[5], y[6], y[7], inverse)};
    }
    if (mean == nullptr) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunks * kChunk; ++i) {
        const int channel = (i / kChunk * kLanes + lane_of_row) * kChunk + i % kChunk;
        dot += to_float<kDtype>(x[half][i / kChunk], i % kChunk) * sm_scale * mean[channel];
      }
#pragma unroll
      for (int lanes = 1; lanes < kLanes; lanes *= 2) dot += __shfl_xor_sync(0xFFFFFFFF, dot, lanes);
#if MASK_BIAS
      dot += sees.bias(first + 8 * half);
#endif
      if (lane_of_row == 0) out.mean_logit[group][row + 8 * half] = dot;
    }
  }
}
