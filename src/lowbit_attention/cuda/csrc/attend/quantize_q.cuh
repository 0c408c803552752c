// A warp quantises 16 rows of Q for the MMA: rows r and r + 8 share a scale.
#pragma once
#include "attend/scale.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

template <Dtype kDtype>
struct Four {  // channels as they lie in memory
  u32 word[kDtype == kFloat32 ? 4 : 2];
};

template <Dtype kDtype>
__device__ __forceinline__ Four<kDtype> load_four(const Strided& q, i64 offset, int channel, bool inside) {
  Four<kDtype> out = {};
  if (!inside) return out;
  if constexpr (kDtype == kFloat32) {
    const Vec16 raw = *reinterpret_cast<const Vec16*>(static_cast<const float*>(q.data) + offset + channel);
#pragma unroll
    for (int i = 0; i < 4; ++i) out.word[i] = raw.word[i];
  } else {
    const Vec8 raw = *reinterpret_cast<const Vec8*>(static_cast<const u16*>(q.data) + offset + channel);
    out.word[0] = raw.word[0], out.word[1] = raw.word[1];
  }
  return out;
}

template <Dtype kDtype>
__device__ __forceinline__ float to_float(const Four<kDtype>& four, int i) {
  if constexpr (kDtype == kFloat32) {
    return __uint_as_float(four.word[i]);
  } else {
    const u32 pair = four.word[i / 2];
    if constexpr (kDtype == kFloat16) return cvt_f32_f16(u16(i % 2 ? pair >> 16 : pair));
    else return __uint_as_float(i % 2 ? pair & 0xFFFF0000 : pair << 16);
  }
}

// Brings 16 rows to L1 before they are asked for: their loads would wait for memory one after the other.
template <Dtype kDtype>
__device__ void prefetch_rows(const Strided& q, i64 base, i32 first_row, i32 rows, i32 channels) {
  constexpr int kBytes = kDtype == kFloat32 ? 4 : 2, kLine = 128;
  const i32 lane = threadIdx.x % 32, row = first_row + lane % 16;
  if (row >= rows) return;
  const u8* from = static_cast<const u8*>(q.data) + (base + i64(row) * q.token) * kBytes;
#pragma unroll 1
  for (int at = lane / 16 * kLine; at < channels * kBytes; at += 2 * kLine) prefetch_global_l1(from + at);
}

// Rows [first_row, first_row + 16) of the head at `base` become rows 16 · warp … of `tile`, swizzled. `scales` [8] takes
// δ · logits_scale.
//
// Q is read again, through L1, between finding the maximum and rounding: the producer has few registers.
template <Dtype kDtype, int kDim>
__device__ void quantize_rows(const Strided& q, i64 base, i32 first_row, i32 rows, i32 channels, float sm_scale,
                              float logits_scale, u8* tile, int warp, float* scales) {
  constexpr int kFours = kDim / 16;                             // a quad's thread takes 4 of every 16 channels
  constexpr int kAtOnce = kDtype == kFloat32 ? 1 : 2;           // loads of each row under way
  const int lane = threadIdx.x % 32, quad = lane / 4, turn = lane % 4;
  const i64 offset = base + i64(first_row + quad) * q.token;
  const auto load = [&](int half, int i) {
    const int channel = 16 * i + 4 * turn;
    const bool inside = first_row + quad + 8 * half < rows && channel < channels;
    return load_four<kDtype>(q, offset + 8 * half * q.token, channel, inside);
  };
  float largest = 0.0f;
#pragma unroll 1
  for (int first = 0; first < kFours; first += kAtOnce) {
    Four<kDtype> x[2][kAtOnce];
#pragma unroll
    for (int i = 0; i < 2 * kAtOnce; ++i) x[i / kAtOnce][i % kAtOnce] = load(i / kAtOnce, first + i % kAtOnce);
#pragma unroll
    for (int i = 0; i < 8 * kAtOnce; ++i) {
      largest = max_nan_f32(largest, fabsf(to_float<kDtype>(x[i / (4 * kAtOnce)][i / 4 % kAtOnce], i % 4)));
    }
  }
  const Scale scale = scale_of(shuffle_max_nan(largest, 4), 127.0f);  // over the quad, which shares the two rows
  const float inverse = sm_scale < 0 ? -scale.inverse : scale.inverse;
  if (turn == 0) scales[quad] = __fmul_rn(scale.delta, logits_scale);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
#pragma unroll 2
    for (int i = 0; i < kFours; ++i) {
      const Four<kDtype> x = load(half, i);
      *reinterpret_cast<u32*>(tile + swizzled<kDim>(16 * warp + quad + 8 * half, i) + 4 * turn) = int8x4(
          to_float<kDtype>(x, 0), to_float<kDtype>(x, 1), to_float<kDtype>(x, 2), to_float<kDtype>(x, 3), inverse);
    }
  }
}

// sm_scale · q · mean of the same rows, to `mean_logit` [16].
template <Dtype kDtype, int kDim>
__device__ void mean_logits(const Strided& q, i64 base, i32 first_row, i32 rows, i32 channels, float sm_scale,
                            const float* mean, float* mean_logit) {
  const int quad = threadIdx.x % 32 / 4, turn = threadIdx.x % 4;
#pragma unroll 1
  for (int row = quad; row < 16; row += 8) {
    float dot = 0.0f;
#pragma unroll 2
    for (int channel = 4 * turn; channel < kDim; channel += 16) {
      const bool inside = first_row + row < rows && channel < channels;
      const Four<kDtype> x = load_four<kDtype>(q, base + i64(first_row + row) * q.token, channel, inside);
#pragma unroll
      for (int c = 0; c < 4; ++c) dot += to_float<kDtype>(x, c) * sm_scale * mean[channel + c];
    }
    dot += __shfl_xor_sync(0xFFFFFFFF, dot, 1);
    dot += __shfl_xor_sync(0xFFFFFFFF, dot, 2);
    if (turn == 0) mean_logit[row] = dot;
  }
}
