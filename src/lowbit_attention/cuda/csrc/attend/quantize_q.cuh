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

// Rows [first_row, first_row + 16) of the head at `base` become rows 16 · warp … of `tile`, swizzled. `scales` [8] takes
// δ · logits_scale, `mean_logit` [16] sm_scale · q · mean if there is a mean.
//
// Q is read again, through L1, between finding the maximum and rounding: the producer has few registers.
template <Dtype kDtype, int kDim>
__device__ void quantize_rows(const Strided& q, i64 base, i32 first_row, i32 rows, i32 channels, float sm_scale,
                              float logits_scale, const float* mean, u8* tile, int warp, float* scales,
                              float* mean_logit) {
  constexpr int kFours = kDim / 16;                             // a quad's thread takes 4 of every 16 channels
  constexpr int kAtOnce = kDtype == kFloat32 ? 2 : kFours / 2;  // loads under way
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
  if (mean == nullptr) return;
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    float dot = 0.0f;
#pragma unroll 2
    for (int i = 0; i < kFours; ++i) {
      const Four<kDtype> x = load(half, i);
#pragma unroll
      for (int c = 0; c < 4; ++c) dot += to_float<kDtype>(x, c) * sm_scale * mean[16 * i + 4 * turn + c];
    }
    dot += __shfl_xor_sync(0xFFFFFFFF, dot, 1);
    dot += __shfl_xor_sync(0xFFFFFFFF, dot, 2);
    if (turn == 0) mean_logit[quad + 8 * half] = dot;
  }
}
