// A caller's tensor [batch, heads, tokens, channels], and loads of 8 channels of one token from it.
//
// Batch, head and token strides are the caller's; channels are neighbours, their number is a multiple of 8, and every
// token begins at a multiple of 16 bytes (the host copies the rare tensor that is laid out otherwise).
#pragma once
#include "ptx/convert.cuh"
#include "ptx/copy.cuh"
#include "ptx/math.cuh"

enum Dtype : i32 { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

struct Strided {
  const void* data;
  i64 batch, head, token;  // strides in elements
};

constexpr int kChunk = 8;  // channels that a thread loads at once: 16 bytes of a 16-bit type

template <Dtype kDtype>
struct Raw;  // eight channels as they lie in memory
template <>
struct Raw<kFloat32> {
  Vec16 half[2];
};
template <>
struct Raw<kFloat16> {
  Vec16 half[1];
};
template <>
struct Raw<kBFloat16> {
  Vec16 half[1];
};

// Channels [channel, channel + 8) of the token that begins at `offset`, in elements.
template <Dtype kDtype>
__device__ Raw<kDtype> load_raw(const Strided& tensor, i64 offset, int channel) {
  Raw<kDtype> out;
  constexpr int kParts = sizeof(out.half) / sizeof(Vec16), kBytes = 2 * kParts;
  const u8* from = static_cast<const u8*>(tensor.data) + (offset + channel) * kBytes;
#pragma unroll
  for (int i = 0; i < kParts; ++i) out.half[i] = ld_global_nc_v4(from + 16 * i);
  return out;
}

template <Dtype kDtype>
__device__ Raw<kDtype> zero_raw() {
  Raw<kDtype> out;
#pragma unroll
  for (int i = 0; i < int(sizeof(out.half) / sizeof(u32)); ++i) out.half[i / 4].word[i % 4] = 0;
  return out;
}

// Eight times the same number, which all types have.
template <Dtype kDtype>
__device__ Raw<kDtype> filled_raw(float x) {
  Raw<kDtype> out;
  const u32 pair = kDtype == kBFloat16 ? __float_as_uint(x) >> 16 : cvt_f16x2_f32(0.0f, x);
  const u32 word = kDtype == kFloat32 ? __float_as_uint(x) : pair | pair << 16;
#pragma unroll
  for (int i = 0; i < int(sizeof(out.half) / sizeof(u32)); ++i) out.half[i / 4].word[i % 4] = word;
  return out;
}

template <Dtype kDtype>
__device__ float to_float(const Raw<kDtype>& raw, int i) {
  if constexpr (kDtype == kFloat32) {
    return __uint_as_float(raw.half[i / 4].word[i % 4]);
  } else {
    const u32 pair = raw.half[0].word[i / 2];
    if constexpr (kDtype == kFloat16) return cvt_f32_f16(u16(i % 2 ? pair >> 16 : pair));
    else return __uint_as_float(i % 2 ? pair & 0xFFFF0000 : pair << 16);
  }
}

// The larger of each two channels, or the smaller; NaN if either is.
template <bool kLarger, Dtype kDtype>
__device__ u32 chosen_word(u32 x, u32 y) {
  const float a = __uint_as_float(x), b = __uint_as_float(y);
  if constexpr (kDtype == kFloat32) return __float_as_uint(kLarger ? max_nan_f32(a, b) : min_nan_f32(a, b));
  if constexpr (kDtype == kFloat16) return kLarger ? max_nan_f16x2(x, y) : min_nan_f16x2(x, y);
  return kLarger ? max_nan_bf16x2(x, y) : min_nan_bf16x2(x, y);
}
template <bool kLarger, Dtype kDtype>
__device__ Raw<kDtype> chosen_raw(const Raw<kDtype>& a, const Raw<kDtype>& b) {
  Raw<kDtype> out;
#pragma unroll
  for (int i = 0; i < int(sizeof(out.half) / sizeof(u32)); ++i) {
    out.half[i / 4].word[i % 4] = chosen_word<kLarger, kDtype>(a.half[i / 4].word[i % 4], b.half[i / 4].word[i % 4]);
  }
  return out;
}
