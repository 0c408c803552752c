// K and V to the tiles that attention loads: statistics over the tokens, then one pass that smooths, rotates and rounds.
//
// K: K − k̄ to INT8 or INT4, four scales a tile (keys with equal (key mod 8) / 2 share one) or one. k̄ may be that of a
//    sample of the tokens, which saves the pass over K: the packing then finds the largest scale itself.
// V: V − v̄ or V, one scale a channel. To E4M3, transposed, tokens reordered for P's registers; V_r is an E4M3 number, so
//    that rounding takes away by what a product with the scale's inverse may exceed it. Or to FP16, token by token.
// Tiles are swizzled, with zeros past the last token and the last channel.
//
// Keys that no row sees do not count (common/masks.cuh): with a list of those that are seen, only these are packed, one
// behind the other; with bits, the others are zeros in their places.
//
// Compiled for:
//   HEAD_DIM     64 or 128 (channels are padded to it)
//   INPUT_DTYPE  of tile/strided.cuh
//   TILE_KEYS    128 (wgmma) or 64 (mma.sync)
//   K_LANES      bits of a lane of K: 8 or 4
//   V_HALF       V in FP16 (1) or E4M3 (0)
//   ROTATE       K is rotated after smoothing
//   V_TILE_MEANS V loses its mean over each tile, where that is large (E4M3 only)
//   KEY_LIST, MASK_BITS  which keys count
//   SEQUENCES    sequences of different lengths lie one behind the other (common/sequences.cuh)
#include "common/rotate.cuh"
#include "common/scale.cuh"
#include "pack/statistics.cuh"
#include "ptx/barrier.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

// ---- packing: block (tiles_a_block tiles, head, V or K), in the opposite order of the statistics: what those read last
// is still in L2, V more likely than K and the last heads more likely than the first. (And what is packed last, K of the
// first heads, is what attention reads first.)
//
// A block loads its first tile before it waits for the statistics. That is safe although it may begin while they are
// taken: `statistics` writes neither K nor V, and it is launched without overlap, so whatever wrote them in the stream
// had ended, its writes visible, before the first block of `statistics` began; and this kernel begins only when all of
// those have (griddepcontrol.launch_dependents is their first instruction).

constexpr int kPackThreads = 128;
static_assert(kDim <= kPackThreads, "a thread has one channel's statistics at most");
static_assert(kPackThreads % kChunks == 0, "each thread keeps to its chunk of channels");
constexpr bool kLoadsEarly = CLUSTERS;  // (else the splits are added up meanwhile: 40 registers more, a block less)

struct Channels {  // of a thread's chunk
  float mean[kChunk], inverse[kChunk];  // (inverse: of V only)
};

#if CLUSTERS
__device__ Channels finished_channels(const PackArgs& args, i64 head, bool is_v, int) {
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
  const int count = !is_v && args.k_tokens < args.kv_len ? 1 : args.splits;
  const float* from = args.partials + (i64(!is_v) * args.heads + head) * args.splits * 3 * kDim + channel;
  Statistics all = {0.0f, kInfinity, -kInfinity};
  for (int first = 0; first < count; first += kLoads) {
    float part[kLoads][3];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float* split = from + min(first + i, count - 1) * 3 * kDim;  // (past the end: not counted)
#pragma unroll
      for (int j = 0; j < 3; ++j) part[i][j] = split[j * kDim];
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (first + i >= count) break;
      all.sum += part[i][0];
      all.low = min_nan_f32(all.low, part[i][1]), all.high = max_nan_f32(all.high, part[i][2]);
    }
  }
  return all;
}

__device__ Channels finished_channels(const PackArgs& args, i64 head, bool is_v, int block) {
  __shared__ __align__(16) float mean[kDim], inverse[kDim];
  if (threadIdx.x < kDim) {
    const Statistics all = gathered(args, head, is_v, threadIdx.x);
    const bool writes = block == 0;
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

// Behind the last key that counts nothing is packed, or read.
__device__ int tiles_with_keys(const PackArgs& args, const Keys& keys) {
#if KEY_LIST || SEQUENCES
  return (keys.places + kTileKeys - 1) / kTileKeys;
#else
  return args.tiles;
#endif
}

template <Dtype kDtype>
__device__ void pack_keys(const PackArgs& args, i64 head, int block) {
  constexpr int kRows = kPackThreads / kChunks;  // tokens that the block reads at once
  constexpr int kPasses = kTileKeys / kRows;
  static_assert(kRows % 8 == 0, "a thread's tokens must all be of one scale group: equal token mod 8");
  __shared__ float half_warp_max[kPackThreads / 16];
  const int chunk = threadIdx.x % kChunks, row = threadIdx.x / kChunks;
  const i64 base = base_of(args, args.k, head);
  const Keys keys(args, head);
  const int first = block * args.tiles_a_block, end = min(tiles_with_keys(args, keys), first + args.tiles_a_block);
  static_assert(32 % kRows == 0, "a thread's tokens of a pass are in one word of bits");
  Raw<kDtype> raw[kPasses];
  const auto load = [&](const TileKeys& of_tile) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      raw[i] = zero_raw<kDtype>();
      if (of_tile.holds(i * kRows, row) && chunk * kChunk < args.k_channels) {
        raw[i] = load_raw<kDtype>(args.k, base + i64(of_tile.token(i * kRows + row)) * args.k.token, chunk * kChunk);
      }
    }
  };
  if (kLoadsEarly) load(TileKeys(keys, min(first, args.tiles - 1)));
  griddepcontrol_wait();  // the statistics are there
  const Channels channels = finished_channels(args, head, false, block);

  for (int tile = first; tile < end; ++tile) {
    const TileKeys of_tile(keys, tile);
    if (!kLoadsEarly || tile > first) load(of_tile);
#if ROTATE
    float rotated[kPasses][kChunk];
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const bool inside = of_tile.holds(i * kRows, row);
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
      if (of_tile.holds(i * kRows, row)) {
#pragma unroll
        for (int c = 0; c < kChunk; ++c) largest = max_nan_f32(largest, fabsf(value(i, c)));
      }
    }
    // 16 neighbouring threads hold tokens of one group; two such half warps make the group, whichever they are
    largest = shuffle_max_nan(largest, 16);
    __syncthreads();  // the last tile's maxima have been read
    if (threadIdx.x % 16 == 0) half_warp_max[threadIdx.x / 16] = largest;
    __syncthreads();
    static_assert(kDim == 64 || kDim == 128, "which half warps make a group is written here for one or two tokens each");
    const int group = row % 8 / 2;
    float group_max = kDim == 128 ? max_nan_f32(half_warp_max[2 * group], half_warp_max[2 * group + 1])
                                  : max_nan_f32(half_warp_max[group], half_warp_max[group + 4]);
    if (args.one_k_scale) {
#pragma unroll
      for (int i = 0; i < kPackThreads / 16; ++i) group_max = max_nan_f32(group_max, half_warp_max[i]);
    }
    const Scale scale = scale_of(group_max, float(args.k_max));
    const i64 number = first_tile_of(args, head) + tile;
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
      if (!of_tile.holds(i * kRows, row)) bytes = {0, 0};
#if K_LANES == 4
      *reinterpret_cast<u32*>(out + swizzled<kDim / 2>(at, chunk / 4) + chunk % 4 * 4) =
          int4x4(bytes.word[0]) | int4x4(bytes.word[1]) << 16;
#else
      *reinterpret_cast<Vec8*>(out + swizzled<kDim>(at, chunk / 2) + chunk % 2 * 8) = bytes;
#endif
    }
  }
}

#if V_TILE_MEANS
static_assert(!V_HALF && CLUSTERS, "means by tile are for wgmma's E4M3");
constexpr int kGroups = kTileKeys / 16;  // of 16 tokens, a thread's
constexpr int kTileThreads = kChunks * kGroups;
static_assert(kTileThreads <= kPackThreads, "a tile's threads are of one block");
static_assert(kTileThreads == kDim, "each thread of a tile decides for one channel");

struct TileStatistics {
  float of_groups[4][kGroups][kDim];  // sum, squares, lowest, highest, in units of V's scales
  i32 counts[kGroups];
  u32 has_no_small[kGroups];          // each of its tokens is somewhere an eighth of V_r
  float mean[kDim];
};

// The tile's means in the thread's channels, 0 where none is taken: the rule of `value_tile_means` (reference/smoothing.py).
// `inside`: a bit for each of the thread's tokens that counts; the others are zeros.
template <Dtype kDtype>
__device__ void take_tile_means(const PackArgs& args, i64 head, int tile, int places, const Raw<kDtype> (&raw)[16], u32 inside,
                                const float (&inverse)[kChunk], float (&mean)[kChunk]) {
  __shared__ __align__(16) TileStatistics tiles[kPackThreads / kTileThreads];
  const int place = threadIdx.x / kTileThreads, chunk = threadIdx.x % kChunks, channel = threadIdx.x % kTileThreads;
  const int group = channel / kChunks;
  TileStatistics& shared = tiles[place];
  const float small = __fmul_rn(args.v_max, 0.125f);
  Raw<kDtype> low = raw[0], high = raw[0];
#pragma unroll
  for (int i = 1; i < 16; ++i) low = chosen_raw<false>(low, raw[i]), high = chosen_raw<true>(high, raw[i]);
  float sum[kChunk], squares[kChunk] = {};
#pragma unroll
  for (int c = 0; c < kChunk; ++c) sum[c] = __fmul_rn(to_float<kDtype>(low, c), inverse[c]);
  store_eight(&shared.of_groups[2][group][chunk * kChunk], sum);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) sum[c] = __fmul_rn(to_float<kDtype>(high, c), inverse[c]);
  store_eight(&shared.of_groups[3][group][chunk * kChunk], sum);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) sum[c] = 0.0f;
  u32 not_small = ~inside;  // a bit a token
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    bool large = false;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      const float x = __fmul_rn(to_float<kDtype>(raw[i], c), inverse[c]);
      sum[c] += x;
      squares[c] = __fmaf_rn(x, x, squares[c]);
      large |= fabsf(x) >= small;
    }
    not_small |= u32(large) << i;
  }
#pragma unroll
  for (int lanes = 1; lanes < kChunks; lanes *= 2) not_small |= __shfl_xor_sync(0xFFFFFFFF, not_small, lanes);
  if (chunk == 0) {
    shared.has_no_small[group] = (not_small & 0xFFFF) == 0xFFFF;
    if (MASK_BITS) shared.counts[group] = __popc(inside);
  }
  store_eight(&shared.of_groups[0][group][chunk * kChunk], sum);
  store_eight(&shared.of_groups[1][group][chunk * kChunk], squares);
  bar_sync(1 + place, kTileThreads);

  float all[4] = {0.0f, 0.0f, kInfinity, -kInfinity};
  bool takes = true;
  i32 counted = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (MASK_BITS) counted += shared.counts[i];
    takes = takes && shared.has_no_small[i];
    all[0] += shared.of_groups[0][i][channel];
    all[1] += shared.of_groups[1][i][channel];
    all[2] = min_nan_f32(all[2], shared.of_groups[2][i][channel]);
    all[3] = max_nan_f32(all[3], shared.of_groups[3][i][channel]);
  }
  const float count = float(max(MASK_BITS ? counted : min(kTileKeys, places - tile * kTileKeys), 1));
  const u32 half = cvt_f16x2_f32(0.0f, __fdiv_rn(all[0], count));
  const float candidate = cvt_f32_f16(u16(half));
  // mean² > σ² / 4; and what is left stays within V_r (both are false of NaN)
  takes = takes && 5.0f * all[0] * all[0] > count * all[1] && all[3] - candidate <= args.v_max && candidate - all[2] <= args.v_max;
  shared.mean[channel] = takes ? candidate : 0.0f;
  args.v_tile_means[(first_tile_of(args, head) + tile) * kDim + channel] = takes ? u16(half) : 0;
  bar_sync(1 + place, kTileThreads);
  load_eight(mean, &shared.mean[chunk * kChunk]);
}
#endif

template <Dtype kDtype>
__device__ void pack_values(const PackArgs& args, i64 head, int block) {
  const int chunk = threadIdx.x % kChunks;
  const i64 base = base_of(args, args.v, head);
#if V_HALF
  constexpr int kTiles = 1;                      // that the block reads at once
  constexpr int kStep = kPackThreads / kChunks;  // tokens from one of a thread's to the next
  constexpr int kTokens = kTileKeys / kStep;     // a thread's of a tile
  const int token_of_tile = threadIdx.x / kChunks;
#else
  constexpr int kStep = 1, kTokens = 16;                     // a thread's: one 16-byte chunk of a channel's row
  constexpr int kThreads = kChunks * (kTileKeys / kTokens);  // that a tile takes
  constexpr int kTiles = kPackThreads / kThreads;
  static_assert(kPackThreads % kThreads == 0, "the block packs whole tiles at once");
  const int group = threadIdx.x % kThreads / kChunks, token_of_tile = group * kTokens;
#endif
  const Keys keys(args, head);
  const int end = min(tiles_with_keys(args, keys), (block + 1) * args.tiles_a_block);
  const int first = block * args.tiles_a_block + threadIdx.x / (kPackThreads / kTiles);
  // A bit for each of the thread's tokens that counts.
  const auto counting = [&](const TileKeys& of_tile) {
#if MASK_BITS && !V_HALF
    u32 word = 0;
#pragma unroll
    for (int i = 0; i < kTileKeys / 32; ++i) word = token_of_tile / 32 == i ? of_tile.bits[i] : word;
    return word >> token_of_tile % 32 & 0xFFFF;
#elif MASK_BITS
    static_assert(32 % kStep == 0, "a thread's tokens of a pass are in one word of bits");
    u32 out = 0;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) out |= u32(of_tile.holds(i * kStep, token_of_tile)) << i;
    return out;
#else
    const int left = of_tile.end - of_tile.first - token_of_tile;  // up to the last key
    return (1u << max(0, min(kTokens, (left + kStep - 1) / kStep))) - 1;
#endif
  };
  Raw<kDtype> raw[kTokens];
  const auto load = [&](const TileKeys& of_tile) {
    const u32 counts = counting(of_tile);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      raw[i] = zero_raw<kDtype>();
      if ((counts >> i & 1) && chunk * kChunk < args.v_channels) {
        raw[i] = load_raw<kDtype>(args.v, base + i64(of_tile.token(token_of_tile + i * kStep)) * args.v.token, chunk * kChunk);
      }
    }
  };
  if (kLoadsEarly) load(TileKeys(keys, min(first, args.tiles - 1)));
  griddepcontrol_wait();  // the statistics are there
  const Channels channels = finished_channels(args, head, true, block);

  for (int tile = first; tile < end; tile += kTiles) {
    const TileKeys of_tile(keys, tile);
    if (!kLoadsEarly || tile > first) load(of_tile);
    const u32 inside = counting(of_tile);
    u8* out = args.v_tiles + (first_tile_of(args, head) + tile) * args.v_stride;
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
          if (!(inside >> i & 1)) x[j] = 0.0f;
        }
        halves.word[pair] = cvt_f16x2_f32(x[1], x[0]);
      }
      *reinterpret_cast<Vec16*>(out + swizzled<2 * kDim>(token_of_tile + i * kStep, chunk)) = halves;
    }
#else
#if V_TILE_MEANS
    float tile_mean[kChunk];
    take_tile_means<kDtype>(args, head, tile, keys.places, raw, inside, channels.inverse, tile_mean);
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {  // (they are converted again: kept as floats they would spill)
#pragma unroll
      for (int word = 0; word < int(sizeof(raw[i]) / sizeof(u32)); ++word) pin_register(raw[i].half[word / 4].word[word % 4]);
    }
#endif
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      Vec16 bytes;
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {
        float x[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = kTokenOrder[2 * pair + i];
#if V_TILE_MEANS
          x[i] = __fmaf_rn(to_float<kDtype>(raw[token], c), channels.inverse[c], -tile_mean[c]);
#else
          x[i] = __fmul_rn(__fsub_rn(to_float<kDtype>(raw[token], c), channels.mean[c]), channels.inverse[c]);
#endif
          if (!(inside >> token & 1)) x[i] = 0.0f;
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
constexpr int kPackBlocks =
    TILE_KEYS == 128 && HEAD_DIM == 128 && INPUT_DTYPE != kFloat32 ? 4 : kBlocks;

// Four blocks a multiprocessor: as many as the host launches run at once.
extern "C" __global__ void __launch_bounds__(kStatisticsThreads, 4) statistics(const __grid_constant__ PackArgs args) {
  griddepcontrol_launch_dependents();
#if CLUSTERS
  barrier_cluster_arrive();
#endif
  extern __shared__ __align__(16) u8 memory[];
  gather_statistics(args, *reinterpret_cast<StatisticsShared*>(memory));
}
extern "C" __global__ void __launch_bounds__(kPackThreads, kPackBlocks) pack(const __grid_constant__ PackArgs args) {
  griddepcontrol_launch_dependents();
#if SEQUENCES  // (of one head of K: its sequences' blocks, one behind the other, and more than there are)
  const SequenceArgs& all = args.sequences;
  const i32 sequence = last_start(all.pack_starts, all.count, blockIdx.x);
  if (i32(blockIdx.x) >= all.pack_starts[all.count]) return;
  const i32 head = sequence * args.kv_heads + blockIdx.y, block = blockIdx.x - all.pack_starts[sequence];
#else
  const i32 head = args.heads - 1 - i32(blockIdx.y + blockIdx.z / 2 * gridDim.y), block = blockIdx.x;
  if (head < 0) return;  // (heads are more than a grid's second dimension: some come in its third)
#endif
  if (blockIdx.z % 2 == 0) pack_values<Dtype(INPUT_DTYPE)>(args, head, block);
  else pack_keys<Dtype(INPUT_DTYPE)>(args, head, block);
}
