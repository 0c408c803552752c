// Statistics of K and V over the tokens, and what packing needs of them.
#pragma once
#include "common/masks.cuh"
#include "common/sequences.cuh"
#include "common/scale.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/copy.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

constexpr int kChunks = kDim / kChunk;  // 8-channel chunks of a token

// Packed for wgmma, so on Hopper: the splits of a head's statistics are a thread block cluster, which adds them up.
// Elsewhere each block of `pack` adds them up again, which takes it as long as a tile does. (A block that finds itself
// the last of its head, by a counter, could do it everywhere, but nobody sets such a counter to zero: the workspace is
// whatever the allocator has, one more launch costs what this saves, and a counter of the device's own would be shared
// by calls on other streams and by replayed graphs.)
constexpr int kMostClusterSplits = 8;  // the largest cluster that every Hopper card takes

struct PackArgs {
  Strided k, v;       // [B, Hkv, Nk, D] and [B, Hkv, Nk, Dv]
  float* partials;    // [2 (V, K)][B · Hkv][splits][3 (sum, low, high)][kDim]; not with clusters
  u8* k_tiles;        // [B · Hkv][tiles], `k_stride` bytes apart: [64 or 128 keys][kDim] lanes
  float* k_scales;    // [B · Hkv][tiles], `k_scale_stride` floats apart: [4]
  u8* v_tiles;        // [B · Hkv][tiles], `v_stride` bytes apart: E4M3 [kDim][keys], or FP16 [keys][kDim]
  float* k_mean;      // [B · Hkv][kDim]; zeros without smooth K
  float* k_largest_scale;  // [B · Hkv], of all tiles
  float* v_scale;     // [B · Hkv][kDim]
  float* v_mean;      // [B · Hkv][kDim]; zeros without smooth V
  float* v_inverse;   // [B · Hkv][kDim], what V is multiplied with; with clusters only
  u32* zeros;         // words that attention wants to be 0
  i64 k_stride, v_stride, k_scale_stride;
  float v_max;        // V_r
  i32 heads;          // B · Hkv
  i32 kv_heads, kv_len, k_channels, v_channels;
  i32 splits, tokens_a_split;  // of the statistics
  i32 k_tokens;       // of K's: kv_len, or a sample of fewer, at most 1024, which one block reads
  i32 tiles, tiles_a_block;    // of the packing
  i32 smooth_k, smooth_v;
  i32 k_max;              // 127 or 7
  i32 one_k_scale;        // the tile's keys share a scale
  i32 zero_scale_is_zero; // what a group of zeros gets for a scale: 0 or 1
  i32 v_power_of_two;     // V's scales are powers of two
  i32 zero_count;         // of `zeros`
  MaskArgs mask;          // which keys count
  SequenceArgs sequences;  // with SEQUENCES
#if V_TILE_MEANS
  u16* v_tile_means;      // [B · Hkv][tiles][kDim], FP16 in units of V's scales
#endif
};

// The first element of a head of K or V, and the number of its first tile.
__device__ i64 base_of(const PackArgs& args, const Strided& tensor, i64 head) {
#if SEQUENCES
  return i64(args.sequences.key_starts[head / args.kv_heads]) * tensor.token + head % args.kv_heads * tensor.head;
#else
  return head / args.kv_heads * tensor.batch + head % args.kv_heads * tensor.head;
#endif
}
__device__ i64 first_tile_of(const PackArgs& args, i64 head) {
#if SEQUENCES
  return head % args.kv_heads * args.tiles + args.sequences.tile_starts[head / args.kv_heads];
#else
  return head * args.tiles;
#endif
}

// The keys of a head that count, and their places in the tiles.
struct Keys {
  i32 count;        // that count
  i32 places;       // of the tiles, to the last key's
#if LISTS_KEYS
  const i32* list;  // of those that count, ascending
  const u32* seen;  // a bit of each key's place
#endif
  __device__ Keys(const PackArgs& args, i64 head) : count(args.kv_len), places(args.kv_len) {
#if SEQUENCES
    count = places = args.sequences.key_counts[head / args.kv_heads];
#elif LISTS_KEYS
    const i64 number = args.mask.list(head / args.kv_heads, head % args.kv_heads);
    count = args.mask.key_counts[number];
    list = args.mask.keys + number * args.kv_len;
#endif
#if KEY_LIST
    places = count;  // they lie one behind the other
#elif MASK_BITS
    seen = args.mask.key_seen + number * args.tiles * (kTileKeys / 32);
#endif
  }
  // The i-th that counts: its token.
  __device__ i32 counted(i32 i) const {
#if LISTS_KEYS
    return list[i];
#else
    return i;
#endif
  }
};

// Those of one tile.
struct TileKeys {
  i32 first, end;  // the tile's first place, and the last key's
#if KEY_LIST
  const i32* list;
  i32 token_of_first;
  bool neighbours;  // their tokens are: as nearly always, so that they need not be read
#elif MASK_BITS
  u32 bits[kTileKeys / 32];
#endif
  __device__ TileKeys(const Keys& keys, i32 tile) : first(tile * kTileKeys), end(keys.places) {
#if KEY_LIST
    list = keys.list + first;
    const i32 last = min(kTileKeys, end - first) - 1;
    if (last >= 0) token_of_first = list[0], neighbours = list[last] == token_of_first + last;
#elif MASK_BITS
#pragma unroll
    for (int i = 0; i < kTileKeys / 32; ++i) bits[i] = keys.seen[tile * (kTileKeys / 32) + i];
#endif
  }
  // Whether place `step` + `rest` of the tile has a key that counts (step: known to the compiler, a multiple of what is
  // above rest, so that both are in one word), and its token.
  __device__ bool holds(int step, int rest) const {
#if MASK_BITS
    return bits[step / 32] >> (step % 32 + rest) & 1;
#else
    return first + step + rest < end;
#endif
  }
  __device__ i32 token(int at) const {
#if KEY_LIST
    return neighbours ? token_of_first + at : list[at];
#else
    return first + at;
#endif
  }
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

// Statistics of `count` parts, always added in the same order.
template <class Part>
__device__ Statistics added_up(int count, Part part) {
  Statistics all = {0.0f, kInfinity, -kInfinity};
  for (int i = 0; i < count; ++i) {
    const Statistics next = part(i);
    all.sum += next.sum, all.low = min_nan_f32(all.low, next.low), all.high = max_nan_f32(all.high, next.high);
  }
  return all;
}

// Any constant vector is a valid mean, so plain float32 sums are good enough; but none is taken that could make some finite
// number's difference overflow, or that is not finite itself. It does not take the extremes to see that, and of a sample
// they would say nothing of the rest.
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
  const float mean = args.smooth_k ? mean_of(all.sum, min(args.k_tokens, Keys(args, head).count)) : 0.0f;
  if (writes) args.k_mean[head * kDim + threadIdx.x] = mean;
  if (writes && !tiles_find_largest(args)) {
    if (threadIdx.x == 0) largest_of_head = 0;
    bar_sync(1, kDim);
    const float largest = KEYS_UNSEEN && Keys(args, head).count == 0 ? 0.0f : largest_difference(all, mean);
    atomicMax(&largest_of_head, __float_as_int(largest) & 0x7FFFFFFF);
    bar_sync(1, kDim);
    if (threadIdx.x == 0) args.k_largest_scale[head] = scale_of(__int_as_float(largest_of_head), float(args.k_max)).delta;
  }
  return {mean, 0.0f};
}
__device__ Finished finish_values(const PackArgs& args, i64 head, const Statistics& all, bool writes) {
  const i32 tokens = Keys(args, head).count;
  const float mean = args.smooth_v ? mean_of(all.sum, tokens) : 0.0f;
  const Scale scale = value_scale(KEYS_UNSEEN && tokens == 0 ? 0.0f : largest_difference(all, mean), args);
  if (writes) args.v_mean[head * kDim + threadIdx.x] = mean, args.v_scale[head * kDim + threadIdx.x] = scale.delta;
  return {mean, scale.inverse};
}

// ---- statistics: a block is a split of a head of K (a sample is not split) or, after those, of V. A thread reads one chunk of
// channels of every kLanes-th token. Copies to shared memory, where each thread has its own places, keep more loads under
// way than registers would hold; and as soon as a batch of them is there, the next but one begins.

constexpr int kStatisticsThreads = 256;
constexpr int kLanes = kStatisticsThreads / kChunks;
static_assert(kDim <= kStatisticsThreads, "a thread adds up one channel at most");
static_assert(kStatisticsThreads % kChunks == 0, "a thread keeps to its chunk of channels");
static_assert(kDim % 32 == 0, "finish_keys' barrier counts whole warps");
constexpr Dtype kStatisticsInput = Dtype(INPUT_DTYPE);
// Tokens that a thread has in registers at once and adds pairwise.
constexpr int kBatch = INPUT_DTYPE == 0 ? 2 : 4;  // (FP32's are larger)
constexpr int kBatches = 2;  // under way
using StatisticsRaw = Raw<kStatisticsInput>;

struct StatisticsShared {
  union {
    StatisticsRaw raw[kBatches][kBatch][kStatisticsThreads];
    float of_lanes[3][kLanes][kDim];
  };
  float of_splits[3][kMostClusterSplits][kDim];  // of every block of the cluster, in the first one's memory
};

// Statistics of tokens place(first), place(first + kLanes), … below place(end) of the head at `base`, to of_lanes.
template <class Place>
__device__ void gather_lane(StatisticsShared& shared, const Strided& tensor, i64 base, int channels, int first, int end,
                            Place place) {
  constexpr int kParts = sizeof(StatisticsRaw) / 16, kBytes = 2 * kParts;
  const int channel = threadIdx.x % kChunks * kChunk, lane = threadIdx.x / kChunks;
  const u8* from = static_cast<const u8*>(tensor.data) + (base + channel) * kBytes;
  const bool exists = channel < channels;
  first += lane;
  float sum[kChunk] = {};
  StatisticsRaw low = filled_raw<kStatisticsInput>(kInfinity), high = filled_raw<kStatisticsInput>(-kInfinity);

  const auto copy = [&](int batch, int token) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i, token += kLanes) {
      if (exists && token < end) {
        const u8* raw = from + i64(place(token)) * tensor.token * kBytes;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          cp_async_cg_16(shared_address(&shared.raw[batch][i][threadIdx.x].half[part]), raw + 16 * part);
        }
      }
    }
    cp_async_commit_group();
  };
#pragma unroll
  for (int batch = 0; batch < kBatches; ++batch) copy(batch, first + batch * kBatch * kLanes);
  int batch = 0;
  for (int token = first; token < end; token += kBatch * kLanes) {
    cp_async_wait_group<kBatches - 1>();
    StatisticsRaw raw[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool inside = token + i * kLanes < end;
      raw[i] = exists && inside ? shared.raw[batch][i][threadIdx.x] : zero_raw<kStatisticsInput>();
      if (inside) low = chosen_raw<false>(low, raw[i]), high = chosen_raw<true>(high, raw[i]);
    }
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      float x[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) x[i] = to_float<kStatisticsInput>(raw[i], c);
#pragma unroll
      for (int step = 1; step < kBatch; step *= 2) {
#pragma unroll
        for (int i = 0; i < kBatch; i += 2 * step) x[i] += x[i + step];
      }
      sum[c] += x[0];
    }
    copy(batch, token + kBatches * kBatch * kLanes);  // (what was there is in registers)
    batch = batch + 1 == kBatches ? 0 : batch + 1;
  }
  cp_async_wait_group<0>();
  __syncthreads();  // nobody reads or writes raw numbers any more
  store_eight(&shared.of_lanes[0][lane][channel], sum);
  float numbers[kChunk];
#pragma unroll
  for (int c = 0; c < kChunk; ++c) numbers[c] = to_float<kStatisticsInput>(low, c);
  store_eight(&shared.of_lanes[1][lane][channel], numbers);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) numbers[c] = to_float<kStatisticsInput>(high, c);
  store_eight(&shared.of_lanes[2][lane][channel], numbers);
  __syncthreads();
}

// Token ⌊(i + ½) · kv_len / tokens⌋, with kv_len = step · tokens + rest so that nothing leaves 31 bits.
__device__ int sampled_token(int i, int tokens, int step, int rest) {
  return i * step + u32(step * tokens + (2 * i + 1) * rest) / u32(2 * tokens);
}

// Of three arrays of [parts][kDim], a thread's channel.
template <int kParts>
__device__ Statistics added_up(const float (&parts)[3][kParts][kDim], int count) {
  return added_up(count, [&](int i) {
    return Statistics{parts[0][i][threadIdx.x], parts[1][i][threadIdx.x], parts[2][i][threadIdx.x]};
  });
}

__device__ void gather_statistics(const PackArgs& args, StatisticsShared& shared) {
  const int of_k = gridDim.x - args.heads * args.splits;
  const bool is_v = int(blockIdx.x) >= of_k, is_sample = !is_v && args.k_tokens < args.kv_len;
  const int unit = is_v ? blockIdx.x - of_k : blockIdx.x;
  const int head = is_sample ? unit : unit / args.splits, split = is_sample ? 0 : unit % args.splits;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < args.zero_count; i += kStatisticsThreads) args.zeros[i] = 0;
  }
  if (head >= args.heads) return;  // (beside samples, to make a cluster whole)
  const Strided& tensor = is_v ? args.v : args.k;
  const int channels = is_v ? args.v_channels : args.k_channels;
  const i64 base = base_of(args, tensor, head);
  if (tiles_find_largest(args) && !is_v && split == 0 && threadIdx.x == 0) {
    // no group that is scaled has less; a head of zeros keeps it (0 would not do: a factor of Q may be infinite)
    args.k_largest_scale[head] = __fdiv_rn(kTiny, float(args.k_max));
  }
  const Keys keys(args, head);
  if (is_sample) {
    const int tokens = min(args.k_tokens, keys.count);
    const int step = keys.count / max(tokens, 1), rest = keys.count % max(tokens, 1);
    gather_lane(shared, tensor, base, channels, 0, tokens,
                [&](int i) { return keys.counted(sampled_token(i, tokens, step, rest)); });
  } else {
    i32 tokens = args.tokens_a_split;
#if KEYS_UNSEEN
    tokens = (keys.count + args.splits * kLanes - 1) / (args.splits * kLanes) * kLanes;
#endif
    const int first = split * tokens, end = min(first + tokens, keys.count);
#if LISTS_KEYS
    const i32 token = first < end ? keys.counted(first) : 0;
    const bool neighbours = first < end && keys.counted(end - 1) - token == end - 1 - first;  // (nearly always)
    gather_lane(shared, tensor, base, channels, first, end,
                [&](int i) { return neighbours ? token + i - first : keys.counted(i); });
#else
    gather_lane(shared, tensor, base, channels, first, end, [](int i) { return i; });
#endif
  }
  Statistics all;
  if (threadIdx.x < kDim) all = added_up(shared.of_lanes, kLanes);
#if CLUSTERS
  if (!is_sample) {
    barrier_cluster_wait();  // the first block has begun, so its shared memory is there
    if (threadIdx.x < kDim) {
      const float numbers[3] = {all.sum, all.low, all.high};
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        const u32 here = shared_address(&shared.of_splits[i][split][threadIdx.x]);
        st_shared_cluster_f32(mapa_shared_cluster(here, 0), numbers[i]);
      }
    }
    barrier_cluster_arrive();
    barrier_cluster_wait();
    if (threadIdx.x < kDim) all = added_up(shared.of_splits, args.splits);
  }
  if (split != 0 || threadIdx.x >= kDim) return;
  if (is_v) args.v_inverse[i64(head) * kDim + threadIdx.x] = finish_values(args, head, all, true).inverse;
  else finish_keys(args, head, all, true);
#else
  if (threadIdx.x >= kDim) return;
  float* out = args.partials + ((i64(!is_v) * args.heads + head) * args.splits + split) * 3 * kDim + threadIdx.x;
  out[0] = all.sum, out[kDim] = all.low, out[2 * kDim] = all.high;
#endif
}
