// Statistics of K and V over the tokens, and what packing needs of them.
#pragma once
#include "attend/scale.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "tile/strided.cuh"

constexpr int kDim = HEAD_DIM;
constexpr int kChunks = kDim / kChunk;  // 8-channel chunks of a token

// Packed for wgmma, so on Hopper: the splits of a head's statistics are a thread block cluster, which adds them up.
// Elsewhere each block of `pack` adds them up again, which takes it as long as a tile does. (A block that finds itself
// the last of its head, by a counter, could do it everywhere, but nobody sets such a counter to zero: the workspace is
// whatever the allocator has, one more launch costs what this saves, and a counter of the device's own would be shared
// by calls on other streams and by replayed graphs.)
#define CLUSTERS (TILE_KEYS == 128)
constexpr int kMostClusterSplits = 8;  // the largest cluster that every Hopper card takes

struct PackArgs {
  Strided k, v;       // [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv]
  float* partials;    // [2 (K, V)][B · Hkv][splits][3 (sum, low, high)][kDim]; not with clusters
  u8* k_tiles;        // [B · Hkv][tiles], `k_stride` bytes apart: [64 or 128 keys][kDim] lanes
  float* k_scales;    // [B · Hkv][tiles], `k_scale_stride` floats apart: [4]
  u8* v_tiles;        // [B · Hkv][tiles], `v_stride` bytes apart: E4M3 [kDim][keys], or FP16 [keys][kDim]
  float* k_mean;      // [B · Hkv][kDim]; zeros without smooth K
  float* k_largest_scale;  // [B · Hkv], of all tiles
  float* v_scale;     // [B · Hkv][kDim]
  float* v_mean;      // [B · Hkv][kDim]; zeros without smooth V
  float* v_inverse;   // [B · Hkv][kDim], what V is multiplied with; with clusters only
  i64 k_stride, v_stride, k_scale_stride;
  float v_max;        // V_r
  i32 kv_heads, kv_len, k_channels, v_channels;
  i32 splits, tokens_a_split;  // of the statistics
  i32 k_tokens, k_tokens_a_split;  // of K's: kv_len, or a sample of fewer, at most 1024
  i32 tiles, tiles_a_block;    // of the packing
  i32 smooth_k, smooth_v;
  i32 k_max;              // 127 or 7
  i32 one_k_scale;        // the tile's keys share a scale
  i32 zero_scale_is_zero; // what a group of zeros gets for a scale: 0 or 1
  i32 v_power_of_two;     // V's scales are powers of two
};

struct Statistics {
  float sum, low, high;
};

// A thread's eight channels, 16 bytes at a time (in shared memory one by one would meet in four banks).
__device__ void load_eight(float (&to)[kChunk], const float* from) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Vec16 four = reinterpret_cast<const Vec16*>(from)[half];
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * half + i] = __uint_as_float(four.word[i]);
  }
}
__device__ void store_eight(float* to, const float (&from)[kChunk]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Vec16 four;
#pragma unroll
    for (int i = 0; i < 4; ++i) four.word[i] = __float_as_uint(from[4 * half + i]);
    reinterpret_cast<Vec16*>(to)[half] = four;
  }
}

// a + b exactly, as sum + error.
__device__ inline float two_sum(float a, float b, float& error) {
  const float sum = __fadd_rn(a, b), other = __fsub_rn(sum, a);
  error = __fadd_rn(__fsub_rn(a, __fsub_rn(sum, other)), __fsub_rn(b, other));
  return sum;
}

// Statistics of `count` parts, always added in the same order.
template <class Part>
__device__ Statistics added_up(int count, Part part) {
  Statistics all = {0.0f, kInfinity, -kInfinity};
  float rest = 0.0f;
  for (int i = 0; i < count; ++i) {
    const Statistics next = part(i);
    float error;
    all.sum = two_sum(all.sum, next.sum, error);
    rest += error;
    all.low = min_nan_f32(all.low, next.low), all.high = max_nan_f32(all.high, next.high);
  }
  all.sum += rest;
  return all;
}

// Any constant vector is a valid mean: none is taken that could make some finite number's difference overflow, or that is
// not finite itself. It does not take the extremes to see that, and of a sample they would say nothing of the rest.
__device__ float mean_of(float sum, int tokens) {
  const float mean = __fdiv_rn(sum, float(tokens));
  return fabsf(mean) < kLargestMean ? mean : 0.0f;
}

// The largest |x − mean| of numbers between low and high.
__device__ float largest_difference(const Statistics& all, float mean) {
  return max_nan_f32(fabsf(__fsub_rn(all.high, mean)), fabsf(__fsub_rn(all.low, mean)));
}

// V's scale from a channel's largest magnitude.
__device__ inline Scale value_scale(float largest, const PackArgs& args) {
  Scale scale = scale_of(largest, args.v_max);
  if (args.v_power_of_two && scale.inverse != 0.0f) {  // rounded up; the inverse is exact
    const bool subnormal = scale.delta < 1.1754943508222875e-38f;  // 2^-126: its bits hold no exponent, times 2 they do
    const u32 bits = __float_as_uint(subnormal ? __fadd_rn(scale.delta, scale.delta) : scale.delta);
    const float power = __uint_as_float(bits + 0x7FFFFF & 0xFF800000);
    scale.delta = subnormal ? __fmul_rn(power, 0.5f) : power;
    scale.inverse = __fdiv_rn(1.0f, scale.delta);
  }
  return scale;
}

// Whether K's largest scale is the packing's to find: the statistics do not know rotated K, nor what they did not read.
__device__ bool tiles_find_largest(const PackArgs& args) { return ROTATE || args.k_tokens < args.kv_len; }

struct Finished {  // what packing needs of a channel
  float mean, inverse;  // (inverse: of V only)
};

// From a channel's statistics; called by the kDim first threads of a block, each with its own channel. One block of a
// head `writes` what attention will read.
__device__ Finished finish_keys(const PackArgs& args, i64 head, const Statistics& all, bool writes) {
  __shared__ i32 largest_of_head;  // of |K − k̄|, the bits of a float that is not negative (NaN is the largest)
  const float mean = args.smooth_k ? mean_of(all.sum, args.k_tokens) : 0.0f;
  if (writes) args.k_mean[head * kDim + threadIdx.x] = mean;
  if (writes && !tiles_find_largest(args)) {
    if (threadIdx.x == 0) largest_of_head = 0;
    bar_sync(1, kDim);
    atomicMax(&largest_of_head, __float_as_int(largest_difference(all, mean)) & 0x7FFFFFFF);
    bar_sync(1, kDim);
    if (threadIdx.x == 0) args.k_largest_scale[head] = scale_of(__int_as_float(largest_of_head), float(args.k_max)).delta;
  }
  return {mean, 0.0f};
}
__device__ Finished finish_values(const PackArgs& args, i64 head, const Statistics& all, bool writes) {
  const float mean = args.smooth_v ? mean_of(all.sum, args.kv_len) : 0.0f;
  const Scale scale = value_scale(largest_difference(all, mean), args);
  if (writes) args.v_mean[head * kDim + threadIdx.x] = mean, args.v_scale[head * kDim + threadIdx.x] = scale.delta;
  return {mean, scale.inverse};
}

// ---- statistics: block (split, head, K or V); a thread reads one chunk of channels of every kLanes-th token

constexpr int kStatisticsThreads = 256;
constexpr int kLanes = kStatisticsThreads / kChunks;
// Loads in flight, of all tokens and of a sample (registers, and it has few); their sum is pairwise, so a channel's mean
// errs by about 3 · 2⁻²⁴ of max.
constexpr int kBatch = 8, kSampleBatch = 4;

struct Sums {  // of the tokens that a thread has read; sum + lost is nearer than a float could be
  float sum[kChunk], lost[kChunk], low[kChunk], high[kChunk];
};

// Tokens place(first), place(first + kLanes), … below place(end), of the head at `base`.
template <Dtype kDtype, int kLoads, class Place>
__device__ Sums sums_of(const Strided& tensor, i64 base, int channels, int first, int end, Place place) {
  const int channel = threadIdx.x % kChunks * kChunk;
  Sums out;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    out.sum[c] = out.lost[c] = 0.0f;
    out.low[c] = kInfinity, out.high[c] = -kInfinity;
  }
  for (int token = first; token < end; token += kLoads * kLanes) {
    Raw<kDtype> raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int t = place(min(token + i * kLanes, end - 1));  // (past the end: read again, not counted)
      raw[i] = zero_raw<kDtype>();
      if (channel < channels) raw[i] = load_raw<kDtype>(tensor, base + i64(t) * tensor.token, channel);
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      float x[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const bool counts = token + i * kLanes < end;
        x[i] = to_float<kDtype>(raw[i], c);
        out.low[c] = min_nan_f32(out.low[c], x[i]);  // (a token seen twice: no matter)
        out.high[c] = max_nan_f32(out.high[c], x[i]);
        x[i] = counts ? x[i] : 0.0f;
      }
#pragma unroll
      for (int step = 1; step < kLoads; step *= 2) {
#pragma unroll
        for (int i = 0; i < kLoads; i += 2 * step) x[i] += x[i + step];
      }
      float error;
      out.sum[c] = two_sum(out.sum[c], x[0], error);
      out.lost[c] += error;
    }
  }
  return out;
}

// Token ⌊(i + ½) · kv_len / tokens⌋, with kv_len = step · tokens + rest so that nothing leaves 31 bits.
__device__ int sampled_token(int i, int tokens, int step, int rest) {
  return i * step + u32(step * tokens + (2 * i + 1) * rest) / u32(2 * tokens);
}

template <Dtype kDtype>
__device__ void gather_statistics(const PackArgs& args) {
  __shared__ __align__(16) float shared[3][kLanes][kDim];
  const bool is_v = blockIdx.z == 1;
  const Strided& tensor = is_v ? args.v : args.k;
  const int channels = is_v ? args.v_channels : args.k_channels;
  const i64 base = i64(blockIdx.y / args.kv_heads) * tensor.batch + i64(blockIdx.y % args.kv_heads) * tensor.head;
  const int chunk = threadIdx.x % kChunks, lane = threadIdx.x / kChunks;
  const int tokens = is_v ? args.kv_len : args.k_tokens, share = is_v ? args.tokens_a_split : args.k_tokens_a_split;
  const int first = blockIdx.x * share + lane, end = min(int(blockIdx.x + 1) * share, tokens);

  Sums sums;
  if (tokens == args.kv_len) {
    sums = sums_of<kDtype, kBatch>(tensor, base, channels, first, end, [](int i) { return i; });
  } else {
    const int step = args.kv_len / tokens, rest = args.kv_len % tokens;
    sums = sums_of<kDtype, kSampleBatch>(tensor, base, channels, first, end,
                                         [&](int i) { return sampled_token(i, tokens, step, rest); });
  }
#pragma unroll
  for (int c = 0; c < kChunk; ++c) sums.sum[c] += sums.lost[c];
  store_eight(&shared[0][lane][chunk * kChunk], sums.sum);
  store_eight(&shared[1][lane][chunk * kChunk], sums.low);
  store_eight(&shared[2][lane][chunk * kChunk], sums.high);
  __syncthreads();
  Statistics mine;
  if (threadIdx.x < kDim) {
    mine = added_up(kLanes, [&](int i) {
      return Statistics{shared[0][i][threadIdx.x], shared[1][i][threadIdx.x], shared[2][i][threadIdx.x]};
    });
  }
#if CLUSTERS
  __shared__ float splits[3][kMostClusterSplits][kDim];  // of every block of the cluster, in the first one's memory
  barrier_cluster_wait();  // the first block has begun, so its shared memory is there
  if (threadIdx.x < kDim) {
    const float numbers[3] = {mine.sum, mine.low, mine.high};
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const u32 here = shared_address(&splits[i][blockIdx.x][threadIdx.x]);
      st_shared_cluster_f32(mapa_shared_cluster(here, 0), numbers[i]);
    }
  }
  barrier_cluster_arrive();
  barrier_cluster_wait();
  if (blockIdx.x != 0 || threadIdx.x >= kDim) return;
  const Statistics all = added_up(args.splits, [&](int i) {
    return Statistics{splits[0][i][threadIdx.x], splits[1][i][threadIdx.x], splits[2][i][threadIdx.x]};
  });
  if (is_v) args.v_inverse[i64(blockIdx.y) * kDim + threadIdx.x] = finish_values(args, blockIdx.y, all, true).inverse;
  else finish_keys(args, blockIdx.y, all, true);
#else
  if (threadIdx.x >= kDim) return;
  const i64 head = i64(blockIdx.z) * gridDim.y + blockIdx.y;
  float* out = args.partials + (head * args.splits + blockIdx.x) * 3 * kDim + threadIdx.x;
  out[0] = mine.sum, out[kDim] = mine.low, out[2 * kDim] = mine.high;
#endif
}
