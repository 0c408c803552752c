// K and V to the tiles that attention loads: statistics over the tokens, then one pass that smooths and rounds.
//
// K: K − k̄ to INT8, four scales a tile (keys with equal (key mod 8) / 2 share one).
// V: V − v̄ or V to E4M3, one scale a channel; transposed, tokens reordered for P's registers. V_r is an E4M3 number, so
//    that rounding takes away by what a product with the scale's inverse may exceed it.
// Both as tiles of 128 keys, swizzled, zeros past the last token and the last channel.
//
// Compiled for: HEAD_DIM 64 or 128 (channels are padded to it), INPUT_DTYPE of tile/strided.cuh.
#include "attend/scale.cuh"
#include "ptx/barrier.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

constexpr int kDim = HEAD_DIM;
constexpr int kChunks = kDim / kChunk;  // 8-channel chunks of a token

struct PackArgs {
  Strided k, v;       // [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv]
  float* partials;    // [2 (K, V)][B · Hkv][splits][3 (sum, low, high)][kDim]
  u8* k_tiles;        // [B · Hkv][tiles][128 keys × kDim]
  float* k_scales;    // [B · Hkv][tiles][4]
  u8* v_tiles;        // [B · Hkv][tiles][kDim × 128 keys]
  float* k_mean;      // [B · Hkv][kDim]; zeros without smooth K
  float* k_largest_scale;  // [B · Hkv], of all tiles
  float* v_scale;     // [B · Hkv][kDim]
  float* v_mean;      // [B · Hkv][kDim]; zeros without smooth V
  float v_max;        // V_r
  i32 kv_heads, kv_len, k_channels, v_channels;
  i32 splits, tokens_a_split;  // of the statistics
  i32 tiles, tiles_a_block;    // of the packing
  i32 smooth_k, smooth_v;
};

struct Statistics {
  float sum, low, high;
};

// a + b exactly, as sum + error.
__device__ inline float two_sum(float a, float b, float& error) {
  const float sum = __fadd_rn(a, b), other = __fsub_rn(sum, a);
  error = __fadd_rn(__fsub_rn(a, __fsub_rn(sum, other)), __fsub_rn(b, other));
  return sum;
}

// ---- statistics: block (split, head, K or V); a thread reads one chunk of channels of every kLanes-th token

constexpr int kStatisticsThreads = 256;
constexpr int kLanes = kStatisticsThreads / kChunks;
constexpr int kBatch = 8;  // loads in flight; their sum is pairwise, so a channel's mean errs by about 3 · 2⁻²⁴ of max

template <Dtype kDtype>
__device__ void gather_statistics(const PackArgs& args) {
  __shared__ float shared[3][kLanes][kDim];
  const bool is_v = blockIdx.z == 1;
  const Strided& tensor = is_v ? args.v : args.k;
  const int channels = is_v ? args.v_channels : args.k_channels;
  const i64 base = i64(blockIdx.y / args.kv_heads) * tensor.batch + i64(blockIdx.y % args.kv_heads) * tensor.head;
  const int chunk = threadIdx.x % kChunks, lane = threadIdx.x / kChunks;
  const int first = blockIdx.x * args.tokens_a_split, end = min(first + args.tokens_a_split, args.kv_len);

  float sum[kChunk], lost[kChunk], low[kChunk], high[kChunk];
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    sum[c] = lost[c] = 0.0f;
    low[c] = kInfinity, high[c] = -kInfinity;
  }
  for (int token = first + lane; token < end; token += kBatch * kLanes) {
    Raw<kDtype> raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int t = min(token + i * kLanes, end - 1);  // (past the end: read again, not counted)
      raw[i] = zero_raw<kDtype>();
      if (chunk * kChunk < channels) {
        raw[i] = load_raw<kDtype>(tensor, base + i64(t) * tensor.token, chunk * kChunk);
      }
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      float x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool counts = token + i * kLanes < end;
        x[i] = to_float<kDtype>(raw[i], c);
        low[c] = min_nan_f32(low[c], x[i]), high[c] = max_nan_f32(high[c], x[i]);  // (a token seen twice: no matter)
        x[i] = counts ? x[i] : 0.0f;
      }
      const float eight = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
      float error;
      sum[c] = two_sum(sum[c], eight, error);
      lost[c] += error;
    }
  }
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    const int channel = chunk * kChunk + c;
    shared[0][lane][channel] = sum[c] + lost[c];
    shared[1][lane][channel] = low[c];
    shared[2][lane][channel] = high[c];
  }
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  Statistics all = {0.0f, kInfinity, -kInfinity};
  float rest = 0.0f;
  for (int i = 0; i < kLanes; ++i) {
    float error;
    all.sum = two_sum(all.sum, shared[0][i][threadIdx.x], error);
    rest += error;
    all.low = min_nan_f32(all.low, shared[1][i][threadIdx.x]);
    all.high = max_nan_f32(all.high, shared[2][i][threadIdx.x]);
  }
  const i64 head = i64(blockIdx.z) * gridDim.y + blockIdx.y;
  float* out = args.partials + (head * args.splits + blockIdx.x) * 3 * kDim + threadIdx.x;
  out[0] = all.sum + rest, out[kDim] = all.low, out[2 * kDim] = all.high;
}

// One channel's statistics over all splits, always added in the same order.
__device__ Statistics gathered(const PackArgs& args, int channel) {
  constexpr int kLoads = 8;  // under way at once
  const i64 head = i64(blockIdx.z) * gridDim.y + blockIdx.y;
  const float* from = args.partials + head * args.splits * 3 * kDim + channel;
  Statistics all = {0.0f, kInfinity, -kInfinity};
  float rest = 0.0f;
  for (int first = 0; first < args.splits; first += kLoads) {
    float part[kLoads][3];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float* split = from + min(first + i, args.splits - 1) * 3 * kDim;  // (past the end: not counted)
#pragma unroll
      for (int j = 0; j < 3; ++j) part[i][j] = split[j * kDim];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i >= args.splits) break;
      float error;
      all.sum = two_sum(all.sum, part[i][0], error);
      rest += error;
      all.low = min_nan_f32(all.low, part[i][1]), all.high = max_nan_f32(all.high, part[i][2]);
    }
  }
  all.sum += rest;
  return all;
}

// Any constant vector is a valid mean: none is taken where a difference or the sum itself could overflow.
__device__ float mean_of(const Statistics& all, int tokens) {
  const bool usable = fmaxf(all.high, -all.low) < kLargestSmoothed && fabsf(all.sum) < kInfinity;
  return usable ? __fdiv_rn(all.sum, float(tokens)) : 0.0f;
}

// ---- packing: block (tiles_a_block tiles, head, K or V)

constexpr int kPackThreads = 128;

template <Dtype kDtype>
__device__ void pack_keys(const PackArgs& args) {
  constexpr int kRows = kPackThreads / kChunks;  // tokens that the block reads at once
  constexpr int kPasses = kTileKeys / kRows;
  static_assert(kRows % 8 == 0, "a thread's tokens must all be of one scale group: equal token mod 8");
  __shared__ float mean[kDim], half_warp_max[kPackThreads / 16];
  __shared__ i32 largest_of_head;  // of |K − k̄|, the bits of a float that is not negative (NaN is the largest)
  const i64 head = blockIdx.y;
  if (threadIdx.x < kDim) {
    const Statistics all = gathered(args, threadIdx.x);
    const float m = args.smooth_k ? mean_of(all, args.kv_len) : 0.0f;
    mean[threadIdx.x] = m;
    if (blockIdx.x == 0) {
      args.k_mean[head * kDim + threadIdx.x] = m;
      if (threadIdx.x == 0) largest_of_head = 0;
      bar_sync(1, kDim);
      const float largest = max_nan_f32(fabsf(__fsub_rn(all.high, m)), fabsf(__fsub_rn(all.low, m)));
      atomicMax(&largest_of_head, __float_as_int(largest) & 0x7FFFFFFF);
      bar_sync(1, kDim);
      if (threadIdx.x == 0) args.k_largest_scale[head] = scale_of(__int_as_float(largest_of_head), 127.0f).delta;
    }
  }
  __syncthreads();
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  const i64 base = head / args.kv_heads * args.k.batch + head % args.kv_heads * args.k.head;
  float mine[kChunk];
#pragma unroll
  for (int c = 0; c < kChunk; ++c) mine[c] = mean[chunk * kChunk + c];

  const int end = min(args.tiles, int(blockIdx.x + 1) * args.tiles_a_block);
  for (int tile = blockIdx.x * args.tiles_a_block; tile < end; ++tile) {
    Raw<kDtype> raw[kPasses];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int token = tile * kTileKeys + i * kRows + row;
      raw[i] = zero_raw<kDtype>();
      if (token < args.kv_len && chunk * kChunk < args.k_channels) {
        raw[i] = load_raw<kDtype>(args.k, base + i64(token) * args.k.token, chunk * kChunk);
      }
    }
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (tile * kTileKeys + i * kRows + row < args.kv_len) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) {
          largest = max_nan_f32(largest, fabsf(__fsub_rn(to_float<kDtype>(raw[i], c), mine[c])));
        }
      }
    }
    // 16 neighbouring threads hold tokens of one group; two such half warps make the group, whichever they are
    largest = shuffle_max_nan(largest, 16);
    __syncthreads();  // the last tile's maxima have been read
    if (threadIdx.x % 16 == 0) half_warp_max[threadIdx.x / 16] = largest;
    __syncthreads();
    const int group = row % 8 / 2;
    const float group_max = kDim == 128 ? max_nan_f32(half_warp_max[2 * group], half_warp_max[2 * group + 1])
                                        : max_nan_f32(half_warp_max[group], half_warp_max[group + 4]);
    const Scale scale = scale_of(group_max, 127.0f);
    const i64 number = head * args.tiles + tile;
    if (chunk == 0 && row < 8 && row % 2 == 0) args.k_scales[number * 4 + group] = scale.delta;
    u8* out = args.k_tiles + number * (kTileKeys * kDim);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int at = i * kRows + row;
      float x[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) x[c] = __fsub_rn(to_float<kDtype>(raw[i], c), mine[c]);
      Vec8 bytes = {int8x4(x[0], x[1], x[2], x[3], scale.inverse), int8x4(x[4], x[5], x[6], x[7], scale.inverse)};
      if (tile * kTileKeys + at >= args.kv_len) bytes = {0, 0};
      *reinterpret_cast<Vec8*>(out + swizzled<kDim>(at, chunk / 2) + chunk % 2 * 8) = bytes;
    }
  }
}

template <Dtype kDtype>
__device__ void pack_values(const PackArgs& args) {
  constexpr int kTokens = 16;                          // a thread's: one 16-byte chunk of a channel's row
  constexpr int kAtOnce = kPackThreads / kDim;         // tiles that the block packs at once
  __shared__ float mean[kDim], inverse[kDim];
  const i64 head = blockIdx.y;
  if (threadIdx.x < kDim) {
    const Statistics all = gathered(args, threadIdx.x);
    const float m = args.smooth_v ? mean_of(all, args.kv_len) : 0.0f;
    const float largest = max_nan_f32(fabsf(__fsub_rn(all.high, m)), fabsf(__fsub_rn(all.low, m)));
    const Scale scale = scale_of(largest, args.v_max);
    mean[threadIdx.x] = m, inverse[threadIdx.x] = scale.inverse;
    if (blockIdx.x == 0) {
      args.v_mean[head * kDim + threadIdx.x] = m;
      args.v_scale[head * kDim + threadIdx.x] = scale.delta;
    }
  }
  __syncthreads();
  const int chunk = threadIdx.x % kChunks, group = threadIdx.x % kDim / kChunks;
  const i64 base = head / args.kv_heads * args.v.batch + head % args.kv_heads * args.v.head;
  const int end = min(args.tiles, int(blockIdx.x + 1) * args.tiles_a_block);
  for (int tile = blockIdx.x * args.tiles_a_block + threadIdx.x / kDim; tile < end; tile += kAtOnce) {
    const int first = tile * kTileKeys + group * kTokens;
    Raw<kDtype> raw[kTokens];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      raw[i] = zero_raw<kDtype>();
      if (first + i < args.kv_len && chunk * kChunk < args.v_channels) {
        raw[i] = load_raw<kDtype>(args.v, base + i64(first + i) * args.v.token, chunk * kChunk);
      }
    }
    u8* out = args.v_tiles + (head * args.tiles + tile) * (kTileKeys * kDim);
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      const int channel = chunk * kChunk + c;
      const float m = mean[channel], r = inverse[channel];
      Vec16 bytes;
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = kTokenOrder[2 * pair + i];
          x[i] = __fmul_rn(__fsub_rn(to_float<kDtype>(raw[token], c), m), r);
          if (first + token >= args.kv_len) x[i] = 0.0f;
        }
        const u32 bits = cvt_e4m3x2_f32(x[1], x[0]);
        if (pair % 2 == 0) bytes.word[pair / 2] = bits;
        else bytes.word[pair / 2] |= bits << 16;
      }
      *reinterpret_cast<Vec16*>(out + swizzled<kTileKeys>(channel, group)) = bytes;
    }
  }
}

extern "C" __global__ void __launch_bounds__(kStatisticsThreads) statistics(const __grid_constant__ PackArgs args) {
  griddepcontrol_launch_dependents();
  gather_statistics<Dtype(INPUT_DTYPE)>(args);
}
extern "C" __global__ void __launch_bounds__(kPackThreads) pack(const __grid_constant__ PackArgs args) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();  // the statistics are there
  if (blockIdx.z == 0) pack_keys<Dtype(INPUT_DTYPE)>(args);
  else pack_values<Dtype(INPUT_DTYPE)>(args);
}
