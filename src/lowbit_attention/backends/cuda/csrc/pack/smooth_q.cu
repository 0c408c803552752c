// What smoothing Q takes besides: the mean of each tile of 128 query rows, and ΔS, that mean's logits with every key.
//
// Compiled for: HEAD_DIM 64 or 128 (channels are padded to it), INPUT_DTYPE of tile/strided.cuh.
#define TILE_KEYS 64
#include "common/masks.cuh"
#include "common/scale.cuh"
#include "ptx/barrier.cuh"
#include "tile/strided.cuh"

constexpr int kChunks = kDim / kChunk;
constexpr int kTileRows = 128;
constexpr Dtype kType = Dtype(INPUT_DTYPE);

struct SmoothArgs {
  Strided q, k;         // [B, Hq, Nq, D], [B, Hkv, Nk, D]
  float* q_mean;        // [B · Hq][query_tiles][kDim]
  const float* k_mean;  // [B · Hkv][kDim]
  float* delta;         // [rows of this launch][delta_stride]
  i64 delta_stride;
  float scale;          // sm_scale · log2 e
  i32 q_heads, kv_heads, q_len, kv_len, channels, query_tiles;
  i32 heads;            // B · Hq
  i32 causal_offset;    // query i sees key j if j ≤ i + causal_offset
  // A launch of delta_s: `levels` blocks of query tiles from `first_level` on, the longest first, of heads from
  // `first_head` on; `groups` query tiles a block.
  i32 first_head, first_level, levels, groups, q_blocks;
  MaskArgs mask;
};

// ---- block (query tile, head)

constexpr int kMeanThreads = 128;
static_assert(kDim <= kMeanThreads, "a thread has one channel's mean at most");
static_assert(kMeanThreads % kChunks == 0, "a thread keeps to its chunk of channels");

extern "C" __global__ void __launch_bounds__(kMeanThreads) query_means(const __grid_constant__ SmoothArgs args) {
  constexpr int kLanes = kMeanThreads / kChunks;  // tokens that the block reads at once
  __shared__ float sums[kLanes][kDim], largest[kLanes][kDim];
  __shared__ int counts[kLanes];
  const i64 head = blockIdx.y + i64(blockIdx.z) * gridDim.y;
  if (head >= args.heads) return;  // (heads are more than a grid's second dimension)
  const i64 base = head / args.q_heads * args.q.batch + head % args.q_heads * args.q.head;
  const int chunk = threadIdx.x % kChunks, lane = threadIdx.x / kChunks;
  const int first = blockIdx.x * kTileRows, end = min(first + kTileRows, args.q_len);
#if MASK_BITS  // rows that see no key do not count, nor do those that are spoilt
  const u8* row_seen = args.mask.row_seen + args.mask.row_block(head / args.q_heads, head % args.q_heads, 0) * kMaskRows;
  const auto sees = [&](int token) { return row_seen[args.mask.row_of(token)] != 0; };
#else
  const auto sees = [](int) { return true; };
#endif
  float sum[kChunk] = {}, top[kChunk] = {};
  int count = 0;
#pragma unroll 4
  for (int step = 0; step < kTileRows; step += kLanes) {
    const int token = first + step + lane;
    const bool counts_here = token < end && sees(token);
    Raw<kType> raw = zero_raw<kType>();
    if (counts_here && chunk * kChunk < args.channels) {
      raw = load_raw<kType>(args.q, base + i64(token) * args.q.token, chunk * kChunk);
    }
    float most = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) most = max_nan_f32(most, fabsf(to_float<kType>(raw, c)));
    if (is_spoilt(shuffle_max_nan(most, kChunks))) continue;  // (the same for all of the token's lanes)
    count += counts_here;
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      const float x = to_float<kType>(raw, c);
      sum[c] += x;
      top[c] = fmaxf(top[c], fabsf(x));
    }
  }
  if (chunk == 0) counts[lane] = count;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) sums[lane][chunk * kChunk + c] = sum[c], largest[lane][chunk * kChunk + c] = top[c];
  __syncthreads();
  if (threadIdx.x >= kDim) return;
  float total = 0.0f, most = 0.0f;
  int counted = 0;
  for (int i = 0; i < kLanes; ++i) {
    total += sums[i][threadIdx.x], most = fmaxf(most, largest[i][threadIdx.x]), counted += counts[i];
  }
  // any constant vector is a valid mean: none is taken where a difference or the sum itself could overflow
  const bool usable = most < kLargestSmoothed && fabsf(total) < kInfinity;
  args.q_mean[(head * args.query_tiles + blockIdx.x) * kDim + threadIdx.x] =
      usable ? __fdiv_rn(total, float(max(counted, 1))) : 0.0f;
}

// ---- block (64 keys, 32 query tiles, head): a product of matrices in float32, which ΔS's size asks for

constexpr int kDeltaThreads = 128, kKeys = 64, kTiles = 32, kDepth = 32;
static_assert(kDim % kDepth == 0, "channels are multiplied kDepth at a time");

extern "C" __global__ void __launch_bounds__(kDeltaThreads, 4) delta_s(const __grid_constant__ SmoothArgs args) {
  __shared__ __align__(16) float means[kDepth][kTiles], keys[kDepth][kKeys];
  const i32 head = args.first_head + i32(blockIdx.z), batch = head / args.q_heads, q_head = head % args.q_heads;
  const i32 kv_head = q_head / (args.q_heads / args.kv_heads);
  const i32 first_row = blockIdx.y * kTiles, rows = args.levels * args.groups, first_key = blockIdx.x * kKeys;
  // the query tile of a row of delta
  const auto tile_of = [&](i32 row) {
    return (args.q_blocks - 1 - args.first_level - row / args.groups) * args.groups + row % args.groups;
  };
  const i32 last_tile = (args.q_blocks - args.first_level - first_row / args.groups) * args.groups - 1;  // of the 32
  if (first_key > i64(last_tile + 1) * kTileRows - 1 + args.causal_offset) return;  // no row of theirs sees the keys
  const i64 base = i64(batch) * args.k.batch + i64(kv_head) * args.k.head;
  const float* k_mean = args.k_mean + (i64(batch) * args.kv_heads + kv_head) * kDim;
#if KEY_LIST
  const i64 list = args.mask.list(batch, kv_head);
  const i32 kv_len = args.mask.key_counts[list];
  const i32* tokens = args.mask.keys + list * args.kv_len;
  const auto token_of = [&](i32 place) { return tokens[place]; };
#else
  const i32 kv_len = args.kv_len;
  const auto token_of = [](i32 place) { return place; };
#endif
  const int x = threadIdx.x % 16 * 4, y = threadIdx.x / 16 * 4;  // the thread's keys and tiles
  float sum[4][4] = {};
  for (int depth = 0; depth < kDim; depth += kDepth) {
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < kKeys * kDepth / kChunk; i += kDeltaThreads) {
      const int key = i % kKeys, channel = depth + i / kKeys * kChunk;
      Raw<kType> raw = zero_raw<kType>();
      const bool inside = first_key + key < kv_len && channel < args.channels;
      if (inside) raw = load_raw<kType>(args.k, base + i64(token_of(first_key + key)) * args.k.token, channel);
#pragma unroll
      for (int c = 0; c < kChunk; ++c) {
        keys[channel - depth + c][key] = inside ? __fsub_rn(to_float<kType>(raw, c), k_mean[channel + c]) : 0.0f;
      }
    }
#pragma unroll
    for (int i = threadIdx.x; i < kTiles * kDepth; i += kDeltaThreads) {
      const int channel = i % kDepth, row = i / kDepth;
      const i32 tile = first_row + row < rows ? tile_of(first_row + row) : args.query_tiles;
      float mean = 0.0f;
      if (tile < args.query_tiles) mean = args.q_mean[(i64(head) * args.query_tiles + tile) * kDim + depth + channel];
      means[channel][row] = __fmul_rn(mean, args.scale);
    }
    __syncthreads();
#pragma unroll 8
    for (int c = 0; c < kDepth; ++c) {
      const Vec16 k = *reinterpret_cast<const Vec16*>(&keys[c][x]), q = *reinterpret_cast<const Vec16*>(&means[c][y]);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        sum[i / 4][i % 4] = __fmaf_rn(__uint_as_float(q.word[i / 4]), __uint_as_float(k.word[i % 4]), sum[i / 4][i % 4]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const i32 row = first_row + y + i;
    if (row >= rows) continue;
    float* out = args.delta + (i64(blockIdx.z) * rows + row) * args.delta_stride + first_key + x;
    *reinterpret_cast<Vec16*>(out) = {{__float_as_uint(sum[i][0]), __float_as_uint(sum[i][1]),
                                       __float_as_uint(sum[i][2]), __float_as_uint(sum[i][3])}};
  }
}
