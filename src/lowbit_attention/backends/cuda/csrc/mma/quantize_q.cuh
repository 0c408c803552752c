// A warp quantizes 32 rows of Q for mma.sync: smoothed, rotated, to INT8 or INT4 lanes in shared memory.
//
// A quad (four neighbouring lanes) has rows r, r + 8, r + 16 and r + 24 of the warp, which share a scale per thread;
// each of its lanes has four of every 16 channels.
#pragma once
#include "common/rotate.cuh"
#include "common/scale.cuh"
#include "ptx/barrier.cuh"
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

enum QGranularity : i32 { kPerThread = 0, kPerWarp = 1, kPerBlock = 2 };  // who shares a scale of Q

struct QueryOptions {
  i32 rows, channels;  // of the tensor
  i32 largest;         // 127 or 7
  i32 granularity;     // QGranularity
  float sm_scale, logits_scale;
};

// The largest magnitude of the lanes that share a scale. `shared`: four floats of the 128 rows' warps.
__device__ inline float group_max(float x, i32 granularity, float* shared, int group) {
  x = shuffle_max_nan(x, 4);
  if (granularity == kPerThread) return x;
  x = shuffle_max_nan(x, 32);
  if (granularity == kPerWarp) return x;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 % 4] = x;
  bar_sync(1 + group, 128);
  return max_nan_f32(max_nan_f32(shared[0], shared[1]), max_nan_f32(shared[2], shared[3]));
}

// Rows [first_row, first_row + 32) of the head at `base` become rows [0, 32) of `tile`. `mean` [kDim]: the query tile's,
// taken away (null: nothing is). `key_mean` [kDim] and `mean_logit` [32 rows in global memory]: sm_scale · q · k̄, if
// the lse is wanted. Returns δ · logits_scale of the lane's rows; `unit` becomes 1 / δ, and `spoilt` a bit a
// row, the lowest the first, 1 if it is spoilt.
template <Dtype kDtype, int kDim, int kLaneBits, bool kSmooth, bool kRotate, class Seen>
__device__ float quantize_32_rows(const Strided& q, i64 base, i32 first_row, const QueryOptions& options,
                                  const Seen& sees, const float* mean, const float* key_mean, float* mean_logit, u8* tile,
                                  float* shared, int group, float& unit, u32& spoilt) {
  constexpr int kCount = kDim / 4;  // channels of a row that a lane has
  constexpr int kRowBytes = kDim * kLaneBits / 8;
  const int lane = threadIdx.x % 32, quad = lane / 4, lane_in_quad = lane % 4;
  float x[4][kCount], largest = 0.0f;
  bool counts[4];  // rows past the end, or that see no key, are zeros, as are spoilt ones: they must not count in a scale
  spoilt = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const i32 row = first_row + quad + 8 * r;
    counts[r] = row < options.rows && sees(row);
    Four<kDtype> raw[kCount / 4];
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const int channel = 16 * i + 4 * lane_in_quad;
      raw[i] = load_four<kDtype>(q, base + i64(row) * q.token, channel, counts[r] && channel < options.channels);
    }
    float top = 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[r][i] = to_float<kDtype>(raw[i / 4], i % 4);
      top = max_nan_f32(top, fabsf(x[r][i]));
    }
    top = shuffle_max_nan(top, 4);
    const bool bad = is_spoilt(top);
    if constexpr (kSmooth) {  // (which way is a matter of the registers that the assembler finds for the main loop)
      if (bad) {
        spoilt |= 1 << r, top = 0.0f;
#pragma unroll
        for (int i = 0; i < kCount; ++i) x[r][i] = 0.0f;
      }
    } else {
      spoilt |= u32(bad) << r;
      top = bad ? 0.0f : top;
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[r][i] = bad ? 0.0f : x[r][i];
    }
    if (!kSmooth && !kRotate) largest = fmaxf(largest, top);
  }
  if (mean_logit != nullptr) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kCount; ++i) dot += x[r][i] * options.sm_scale * key_mean[16 * (i / 4) + 4 * lane_in_quad + i % 4];
      dot += __shfl_xor_sync(0xFFFFFFFF, dot, 1);
      dot += __shfl_xor_sync(0xFFFFFFFF, dot, 2);
#if MASK_BIAS
      if (first_row + quad + 8 * r < options.rows) dot += sees.bias(first_row + quad + 8 * r);
#endif
      if (lane_in_quad == 0 && first_row + quad + 8 * r < options.rows) mean_logit[quad + 8 * r] = dot;
    }
  }
  if constexpr (kSmooth) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float m = mean[16 * (i / 4) + 4 * lane_in_quad + i % 4];
#pragma unroll
      for (int r = 0; r < 4; ++r) x[r][i] = counts[r] && !(spoilt >> r & 1) ? __fsub_rn(x[r][i], m) : 0.0f;
    }
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (kRotate) {
      rotation_begins<kDim>(x[r]);
      butterflies<kCount, 1>(x[r]);
      butterflies<kCount, 2>(x[r]);
      butterflies_across(x[r], 1);
      butterflies_across(x[r], 2);
      butterflies<kCount, 4>(x[r]);
      butterflies<kCount, 8>(x[r]);
      if constexpr (kDim == 128) butterflies<kCount, 16>(x[r]);
      rotation_ends<kDim>(x[r]);
    }
    if constexpr (kSmooth || kRotate) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) largest = max_nan_f32(largest, fabsf(x[r][i]));
    }
  }
  const Scale scale = scale_of(group_max(largest, options.granularity, shared, group), float(options.largest));
  const float inverse = options.sm_scale < 0 ? -scale.inverse : scale.inverse;
  unit = scale.inverse;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int row = quad + 8 * r;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const u32 four = int8x4(x[r][4 * i], x[r][4 * i + 1], x[r][4 * i + 2], x[r][4 * i + 3], inverse);
      if constexpr (kLaneBits == 8) {
        *reinterpret_cast<u32*>(tile + swizzled<kRowBytes>(row, i) + 4 * lane_in_quad) = four;
      } else {
        *reinterpret_cast<u16*>(tile + swizzled<kRowBytes>(row, i / 2) + i % 2 * 8 + 2 * lane_in_quad) = u16(int4x4(four));
      }
    }
  }
  return __fmul_rn(scale.delta, options.logits_scale);
}
