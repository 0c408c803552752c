// K and V to the tiles that attention loads: statistics over the tokens, then one pass that smooths, rotates and rounds.
//
// K: K − k̄ to INT8 or INT4, four scales a tile (keys with equal (key mod 8) / 2 share one) or one. k̄ may be that of a
//    sample of the tokens, which saves the pass over K: the packing then finds the largest scale itself.
// V: V − v̄ or V, one scale a channel. To E4M3, transposed, tokens reordered for P's registers; V_r is an E4M3 number, so
//    that rounding takes away by what a product with the scale's inverse may exceed it. Or to FP16, token by token.
// Tiles are swizzled, with zeros past the last token and the last channel.
//
// Compiled for:
//   HEAD_DIM     64 or 128 (channels are padded to it)
//   INPUT_DTYPE  of tile/strided.cuh
//   TILE_KEYS    128 (wgmma) or 64 (mma.sync)
//   K_LANES      bits of a lane of K: 8 or 4
//   V_HALF       V in FP16 (1) or E4M3 (0)
//   ROTATE       K is rotated after smoothing
#include "attend/rotate.cuh"
#include "attend/scale.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

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

// ---- packing: block (tiles_a_block tiles, head, V or K), in the opposite order of the statistics: what those read last
// is still in L2, V more likely than K and the last heads more likely than the first. (And what is packed last, K of the
// first heads, is what attention reads first.)
//
// A block loads its first tile before it waits for the statistics. That is safe although it may begin while they are
// taken: `statistics` writes neither K nor V, and it is launched without overlap, so whatever wrote them in the stream
// had ended, its writes visible, before the first block of `statistics` began; and this kernel begins only when all of
// those have (griddepcontrol.launch_dependents is their first instruction).

constexpr int kPackThreads = 128;
constexpr bool kLoadsEarly = CLUSTERS;  // (else the splits are added up meanwhile: 40 registers more, a block less)

struct Channels {  // of a thread's chunk
  float mean[kChunk], inverse[kChunk];  // (inverse: of V only)
};

#if CLUSTERS
__device__ Channels finished_channels(const PackArgs& args, i64 head, bool is_v) {
  const i64 first = head * kDim + threadIdx.x % kChunks * kChunk;
  Channels out;
  load_eight(out.mean, (is_v ? args.v_mean : args.k_mean) + first);
  if (is_v) load_eight(out.inverse, args.v_inverse + first);
  return out;
}
#else
// One channel's statistics over all splits, always added in the same order.
__device__ Statistics gathered(const PackArgs& args, i64 head, bool is_v, int channel) {
  constexpr int kLoads = 8;  // under way at once
  const float* from = args.partials + (is_v * i64(gridDim.y) + head) * args.splits * 3 * kDim + channel;
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

__device__ Channels finished_channels(const PackArgs& args, i64 head, bool is_v) {
  __shared__ __align__(16) float mean[kDim], inverse[kDim];
  if (threadIdx.x < kDim) {
    const Statistics all = gathered(args, head, is_v, threadIdx.x);
    const bool writes = blockIdx.x == 0;
    const Finished mine = is_v ? finish_values(args, head, all, writes) : finish_keys(args, head, all, writes);
    mean[threadIdx.x] = mine.mean, inverse[threadIdx.x] = mine.inverse;
  }
  __syncthreads();
  Channels out;
  load_eight(out.mean, mean + threadIdx.x % kChunks * kChunk);
  if (is_v) load_eight(out.inverse, inverse + threadIdx.x % kChunks * kChunk);
  return out;
}
#endif

template <Dtype kDtype>
__device__ void pack_keys(const PackArgs& args, i64 head) {
  constexpr int kRows = kPackThreads / kChunks;  // tokens that the block reads at once
  constexpr int kPasses = kTileKeys / kRows;
  static_assert(kRows % 8 == 0, "a thread's tokens must all be of one scale group: equal token mod 8");
  __shared__ float half_warp_max[kPackThreads / 16];
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  const i64 base = head / args.kv_heads * args.k.batch + head % args.kv_heads * args.k.head;
  const int first = blockIdx.x * args.tiles_a_block, end = min(args.tiles, first + args.tiles_a_block);
  Raw<kDtype> raw[kPasses];
  const auto load = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int token = tile * kTileKeys + i * kRows + row;
      raw[i] = zero_raw<kDtype>();
      if (token < args.kv_len && chunk * kChunk < args.k_channels) {
        raw[i] = load_raw<kDtype>(args.k, base + i64(token) * args.k.token, chunk * kChunk);
      }
    }
  };
  if (kLoadsEarly) load(first);
  griddepcontrol_wait();  // the statistics are there
  const Channels channels = finished_channels(args, head, false);

  for (int tile = first; tile < end; ++tile) {
    if (!kLoadsEarly || tile > first) load(tile);
#if ROTATE
    float rotated[kPasses][kChunk];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool inside = tile * kTileKeys + i * kRows + row < args.kv_len;
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        rotated[i][c] = inside ? __fsub_rn(to_float<kDtype>(raw[i], c), channels.mean[c]) : 0.0f;
      }
      rotation_begins<kDim>(rotated[i]);
      butterflies<kChunk, 1>(rotated[i]);
      butterflies<kChunk, 2>(rotated[i]);
      butterflies<kChunk, 4>(rotated[i]);
#pragma unroll
      for (int lanes = 1; lanes < kChunks; lanes *= 2) butterflies_across(rotated[i], lanes);
      rotation_ends<kDim>(rotated[i]);
    }
    const auto value = [&](int i, int c) { return rotated[i][c]; };
#else
    const auto value = [&](int i, int c) { return __fsub_rn(to_float<kDtype>(raw[i], c), channels.mean[c]); };
#endif
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      if (tile * kTileKeys + i * kRows + row < args.kv_len) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) largest = max_nan_f32(largest, fabsf(value(i, c)));
      }
    }
    // 16 neighbouring threads hold tokens of one group; two such half warps make the group, whichever they are
    largest = shuffle_max_nan(largest, 16);
    __syncthreads();  // the last tile's maxima have been read
    if (threadIdx.x % 16 == 0) half_warp_max[threadIdx.x / 16] = largest;
    __syncthreads();
    const int group = row % 8 / 2;
    float group_max = kDim == 128 ? max_nan_f32(half_warp_max[2 * group], half_warp_max[2 * group + 1])
                                  : max_nan_f32(half_warp_max[group], half_warp_max[group + 4]);
    if (args.one_k_scale) {
#pragma unroll
      for (int i = 0; i < kPackThreads / 16; ++i) group_max = max_nan_f32(group_max, half_warp_max[i]);
    }
    const Scale scale = scale_of(group_max, float(args.k_max));
    const i64 number = head * args.tiles + tile;
    if (chunk == 0 && row < 8 && row % 2 == 0) {
      const bool zero = scale.inverse == 0.0f && scale.delta == 1.0f;
      args.k_scales[number * args.k_scale_stride + group] = zero && args.zero_scale_is_zero ? 0.0f : scale.delta;
      // (the bits of floats that are not negative compare like integers, NaN last)
      if (tiles_find_largest(args) && !zero) {
        atomicMax(reinterpret_cast<i32*>(args.k_largest_scale + head), __float_as_int(scale.delta));
      }
    }
    u8* out = args.k_tiles + number * args.k_stride;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int at = i * kRows + row;
      float x[kChunk];
#pragma unroll
      for (int c = 0; c < kChunk; ++c) x[c] = value(i, c);
      Vec8 bytes = {int8x4(x[0], x[1], x[2], x[3], scale.inverse), int8x4(x[4], x[5], x[6], x[7], scale.inverse)};
      if (tile * kTileKeys + at >= args.kv_len) bytes = {0, 0};
#if K_LANES == 4
      *reinterpret_cast<u32*>(out + swizzled<kDim / 2>(at, chunk / 4) + chunk % 4 * 4) =
          int4x4(bytes.word[0]) | int4x4(bytes.word[1]) << 16;
#else
      *reinterpret_cast<Vec8*>(out + swizzled<kDim>(at, chunk / 2) + chunk % 2 * 8) = bytes;
#endif
    }
  }
}

template <Dtype kDtype>
__device__ void pack_values(const PackArgs& args, i64 head) {
  const int chunk = threadIdx.x % kChunks;
  const i64 base = head / args.kv_heads * args.v.batch + head % args.kv_heads * args.v.head;
#if V_HALF
  constexpr int kTiles = 1;                      // that the block reads at once
  constexpr int kStep = kPackThreads / kChunks;  // tokens from one of a thread's to the next
  constexpr int kTokens = kTileKeys / kStep;     // a thread's of a tile
  const int token_of_tile = threadIdx.x / kChunks;
#else
  constexpr int kStep = 1, kTokens = 16;                     // a thread's: one 16-byte chunk of a channel's row
  constexpr int kThreads = kChunks * (kTileKeys / kTokens);  // that a tile takes
  constexpr int kTiles = kPackThreads / kThreads;
  const int group = threadIdx.x % kThreads / kChunks, token_of_tile = group * kTokens;
#endif
  const int end = min(args.tiles, int(blockIdx.x + 1) * args.tiles_a_block);
  const int first = blockIdx.x * args.tiles_a_block + threadIdx.x / (kPackThreads / kTiles);
  Raw<kDtype> raw[kTokens];
  const auto load = [&](int tile) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int token = tile * kTileKeys + token_of_tile + i * kStep;
      raw[i] = zero_raw<kDtype>();
      if (token < args.kv_len && chunk * kChunk < args.v_channels) {
        raw[i] = load_raw<kDtype>(args.v, base + i64(token) * args.v.token, chunk * kChunk);
      }
    }
  };
  if (kLoadsEarly) load(first);
  griddepcontrol_wait();  // the statistics are there
  const Channels channels = finished_channels(args, head, true);

  for (int tile = first; tile < end; tile += kTiles) {
    if (!kLoadsEarly || tile > first) load(tile);
    const int first_token = tile * kTileKeys + token_of_tile;
    u8* out = args.v_tiles + (head * args.tiles + tile) * args.v_stride;
#if V_HALF
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      Vec16 halves;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        float x[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int c = 2 * pair + j;
          x[j] = __fmul_rn(__fsub_rn(to_float<kDtype>(raw[i], c), channels.mean[c]), channels.inverse[c]);
          if (first_token + i * kStep >= args.kv_len) x[j] = 0.0f;
        }
        halves.word[pair] = cvt_f16x2_f32(x[1], x[0]);
      }
      *reinterpret_cast<Vec16*>(out + swizzled<2 * kDim>(token_of_tile + i * kStep, chunk)) = halves;
    }
#else
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      Vec16 bytes;
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = kTokenOrder[2 * pair + i];
          x[i] = __fmul_rn(__fsub_rn(to_float<kDtype>(raw[token], c), channels.mean[c]), channels.inverse[c]);
          if (first_token + token >= args.kv_len) x[i] = 0.0f;
        }
        const u32 bits = cvt_e4m3x2_f32(x[1], x[0]);
        if (pair % 2 == 0) bytes.word[pair / 2] = bits;
        else bytes.word[pair / 2] |= bits << 16;
      }
      *reinterpret_cast<Vec16*>(out + swizzled<kTileKeys>(chunk * kChunk + c, group)) = bytes;
    }
#endif
  }
}

// (For mma.sync's older cards the assembler would rather spill than have fewer blocks than it likes; 0: as it likes.)
constexpr int kBlocks = TILE_KEYS == 64 ? 2 : 0;
// (Four blocks a multiprocessor instead of three: it wants 137 registers and does as well with 128. At head dimension 64
// it would spill.)
constexpr int kPackBlocks = TILE_KEYS == 128 && HEAD_DIM == 128 && INPUT_DTYPE != kFloat32 ? 4 : kBlocks;

extern "C" __global__ void __launch_bounds__(kStatisticsThreads, kBlocks) statistics(const __grid_constant__ PackArgs args) {
  griddepcontrol_launch_dependents();
#if CLUSTERS
  barrier_cluster_arrive();
#endif
  if (tiles_find_largest(args) && blockIdx.x == 0 && blockIdx.z == 0 && threadIdx.x == 0) {
    // no group that is scaled has less; a head of zeros keeps it (0 would not do: a factor of Q may be infinite)
    args.k_largest_scale[blockIdx.y] = __fdiv_rn(kTiny, float(args.k_max));
  }
  gather_statistics<Dtype(INPUT_DTYPE)>(args);
}
extern "C" __global__ void __launch_bounds__(kPackThreads, kPackBlocks) pack(const __grid_constant__ PackArgs args) {
  griddepcontrol_launch_dependents();
  const i64 head = gridDim.y - 1 - blockIdx.y;
  if (blockIdx.z == 0) pack_values<Dtype(INPUT_DTYPE)>(args, head);
  else pack_keys<Dtype(INPUT_DTYPE)>(args, head);
}
