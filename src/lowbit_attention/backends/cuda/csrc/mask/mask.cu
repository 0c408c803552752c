// A caller's mask to what the kernels read (common/masks.cuh): lists of the keys that some row sees, or bits.
//
//   a mask that is the same for all rows:  list_keys
//   any other:                             pack_bits, list_tiles, list_keys (of what pack_bits has seen)
//   biases:                                pack_biases, and the same
//   said in a few numbers:                 list_by_place, pack_diagonals
//
// Compiled for: TILE_KEYS 128 (wgmma) or 64 (mma.sync).
#include "common/masks.cuh"
#include "ptx/convert.cuh"
#include "ptx/copy.cuh"
#include "ptx/math.cuh"
#include "tile/strided.cuh"

struct PrepareArgs {
  const void* mask;               // [B, H, Nq, Nk]: bool, 0 where a key is hidden, or biases in natural units
  i64 batch, head, row, key;      // strides in elements, 0 where it is broadcast
  i32 q_len, kv_len;
  i32 causal_offset;              // row i sees key j if j ≤ i + causal_offset; kv_len without causality
  i32 first_offset;               // and if j ≥ i + first_offset; −q_len without a window
  i32 planes_a_batch, lists_a_batch, group;  // `group` planes have a list
  i32 dtype;                      // of biases: Dtype of tile/strided.cuh
  i32 tiles, row_blocks;
  i32 lists_seen;                 // list_keys: what pack_bits has seen, not the mask
  i32 q_blocks, row_blocks_a_block;  // work tiles' rows, and how many blocks of bits they have
  i32* key_counts;
  i32* keys;
  u32* key_seen;                  // 0 before pack_bits; list_keys reads it, where `lists_seen`
  MaskWord* bits;
  u16* bias;
  float* row_bias;
  i32* tile_lists;
  u8* row_seen;                   // 0 before pack_bits
  u8* tile_seen;                  // [planes][row_blocks][tiles]
  // Of list_by_place and pack_diagonals:
  const float* slopes;            // [B, Hq] by `batch` and `head`: adds −slope · |row + shift − key|; or null
  const void* kv_lens;            // [B] by `batch`: keys from there on are hidden; or null
  i32 long_lens;                  // these are of 64 bits, else of 32
  i32 shift, nearest;             // of slopes; the distance of the nearest key that a row sees, of those that see some
  i32 diagonals, blocks;          // of a plane: below
};

// ---- a block lists the keys of one head (or of several that see alike)

constexpr int kListThreads = 1024, kListWarps = kListThreads / 32;

extern "C" __global__ void __launch_bounds__(kListThreads) list_keys(const __grid_constant__ PrepareArgs args) {
  __shared__ i32 of_warps[2][kListWarps];
  const i64 list = blockIdx.x;
  const i32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u8* mask = args.lists_seen ? nullptr : static_cast<const u8*>(args.mask) + list / args.lists_a_batch * args.batch + list % args.lists_a_batch * args.head;
  const u32* seen = args.key_seen + list * args.tiles * (TILE_KEYS / 32);
  i32 before = 0;
  for (i32 first = 0, turn = 0; first < args.kv_len; first += kListThreads, turn ^= 1) {
    const i32 key = first + i32(threadIdx.x);
    bool sees = key < args.kv_len;
    if (sees) sees = mask == nullptr ? seen[key / 32] >> key % 32 & 1 : mask[key * args.key];
    const u32 votes = __ballot_sync(0xFFFFFFFF, sees);
    if (lane == 0) of_warps[turn][warp] = __popc(votes);
    __syncthreads();
    i32 rank = before;  // of the warp's first key
    for (i32 w = 0; w < kListWarps; ++w) {
      const i32 count = of_warps[turn][w];
      if (w < warp) rank += count;
      before += count;
    }
    rank += __popc(votes & ((1u << lane) - 1));
    if (sees) args.keys[list * args.kv_len + rank] = key;
  }
  if (threadIdx.x == 0) args.key_counts[list] = before;
}

// ---- a block packs the bits of 64 rows, of kTilesABlock key tiles

constexpr int kBitsThreads = 256, kTilesABlock = 16;
constexpr int kKeysALane = 16;                    // neighbouring keys of a row: 16 bytes
constexpr int kRowLanes = TILE_KEYS / kKeysALane;
constexpr int kRowsAtOnce = kBitsThreads / kRowLanes;
static_assert(kMaskRows % kRowsAtOnce == 0, "a block takes its rows in whole steps");

// Bit k: whether key first + k is seen.
__device__ u32 sixteen_keys(const PrepareArgs& args, const u8* row, i32 first) {
  u32 out = 0;
  const u8* from = row + first * args.key;
  if (args.key == 1 && first + kKeysALane <= args.kv_len && !(reinterpret_cast<u64>(from) & 15)) {
    const Vec16 bytes = ld_global_nc_v4(from);
#pragma unroll
    for (int i = 0; i < kKeysALane; ++i) out |= u32((bytes.word[i / 4] >> i % 4 * 8 & 0xFF) != 0) << i;
    return out;
  }
  for (int i = 0; i < kKeysALane && first + i < args.kv_len; ++i) out |= u32(from[i * args.key] != 0) << i;
  return out;
}

// Bits [low, high] of 16, which may lie anywhere.
__device__ u32 range_of_sixteen(i64 low, i64 high) {
  if (low > 15 || high < 0 || low > high) return 0;
  const u32 from = 0xFFFFu << (low > 0 ? u32(low) : 0u), to = 0xFFFFu >> (high < 15 ? u32(15 - high) : 0u);
  return from & to & 0xFFFF;
}

// Of sixteen keys, those that a row sees by where they stand. (Rows behind the last see none. Where all rows are alike and
// have one block, every row finds itself among the first.)
__device__ u32 seen_by_place(const PrepareArgs& args, i64 row, i32 first_key) {
  if (row >= args.q_len) return 0;
  const i64 high = min(row + args.causal_offset, i64(args.kv_len) - 1) - first_key;
  return range_of_sixteen(row + args.first_offset - first_key, high);
}

// Of a row's keys, sixteen a lane: in lanes 0 to 3 the words of a quad's threads (common/masks.cuh).
__device__ u32 word_of_lanes(u32 seen, i32 lane) {
  u32 words[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const u32 low = seen >> 2 * q & 3, high = seen >> (8 + 2 * q) & 3;
    words[q] = (low | high << 2) << 4 * lane;
#pragma unroll
    for (int lanes = 1; lanes < kRowLanes; lanes *= 2) words[q] |= __shfl_xor_sync(0xFFFFFFFF, words[q], lanes);
  }
  return lane < 2 ? (lane == 0 ? words[0] : words[1]) : (lane == 2 ? words[2] : words[3]);
}

extern "C" __global__ void __launch_bounds__(kBitsThreads) pack_bits(const __grid_constant__ PrepareArgs args) {
  __shared__ u32 of_keys[2][kRowLanes];
  const i64 plane = blockIdx.x / args.row_blocks;
  const i32 row_block = blockIdx.x % args.row_blocks;
  const i64 batch = plane / args.planes_a_batch, head = plane % args.planes_a_batch;
  const i64 list = batch * args.lists_a_batch + head / args.group;
  const i32 lane = threadIdx.x % kRowLanes, first_tile = blockIdx.y * kTilesABlock;
  const i32 end_tile = min(first_tile + kTilesABlock, args.tiles);
  const u8* mask = static_cast<const u8*>(args.mask) + batch * args.batch + head * args.head;
  u32 row_any[kMaskRows / kRowsAtOnce] = {};
  if (threadIdx.x < 2 * kRowLanes) of_keys[threadIdx.x / kRowLanes][threadIdx.x % kRowLanes] = 0;
  __syncthreads();
  for (i32 tile = first_tile, turn = 0; tile < end_tile; ++tile, turn ^= 1) {
    const i32 first_key = tile * TILE_KEYS + lane * kKeysALane;
    u32 of_mine = 0;
#pragma unroll
    for (int step = 0; step < kMaskRows / kRowsAtOnce; ++step) {
      const i32 of_block = step * kRowsAtOnce + threadIdx.x / kRowLanes;
      const i64 row = i64(row_block) * kMaskRows + of_block;
      u32 seen = 0;
      if (first_key < args.kv_len) {
        seen = seen_by_place(args, row, first_key);
        if (seen) seen &= sixteen_keys(args, mask + row * args.row, first_key);
      }
      of_mine |= seen, row_any[step] |= seen;
      const u32 word = word_of_lanes(seen, lane);
      if (lane < 4) {
        const i64 block = plane * args.row_blocks + row_block;
        args.bits[((block * args.tiles + tile) * kMaskRows + of_block) * 4 + lane] = MaskWord(word);
      }
    }
    if (of_mine) atomicOr(&of_keys[turn][lane], of_mine);
    const bool any = __syncthreads_or(of_mine != 0);
    if (threadIdx.x == 0) args.tile_seen[(plane * args.row_blocks + row_block) * args.tiles + tile] = any;
    if (threadIdx.x < TILE_KEYS / 32) {
      const u32 word = of_keys[turn][2 * threadIdx.x] | of_keys[turn][2 * threadIdx.x + 1] << kKeysALane;
      u32* all = args.key_seen + (list * args.tiles + tile) * (TILE_KEYS / 32) + threadIdx.x;
      if (word & ~*all) atomicOr(all, word);
    }
    if (threadIdx.x < kRowLanes) of_keys[turn ^ 1][threadIdx.x] = 0;  // (the last tile's, which all have read)
    __syncthreads();
  }
#pragma unroll
  for (int step = 0; step < kMaskRows / kRowsAtOnce; ++step) {
    const i64 row = i64(row_block) * kMaskRows + step * kRowsAtOnce + threadIdx.x / kRowLanes;
    if (row_any[step]) args.row_seen[plane * args.row_blocks * kMaskRows + row] = 1;
  }
}

// ---- a block packs the biases of 64 rows, of all keys: first each row's largest, then what they are less that

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kHidingBias = 9000.0f;  // below the row's largest: e^−9000 is 0 in every format

// Key first + k of a row, in `out[k]`; −∞ where it is hidden by its place.
__device__ void sixteen_biases(const PrepareArgs& args, i64 row_at, i64 row, i32 first, float (&out)[kKeysALane]) {
  const u32 seen = first < args.kv_len ? seen_by_place(args, row, first) : 0;
  const i32 size = args.dtype == kFloat32 ? 4 : 2;
  const u8* from = static_cast<const u8*>(args.mask) + (row_at + first * args.key) * size;
  const bool is_whole = args.key == 1 && first + kKeysALane <= args.kv_len && !(reinterpret_cast<u64>(from) & 15);
  Vec16 raw[4] = {};
  if (seen && is_whole) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (16 * i < kKeysALane * size) raw[i] = ld_global_nc_v4(from + 16 * i);
    }
  }
#pragma unroll
  for (int k = 0; k < kKeysALane; ++k) {
    out[k] = -kInfinity;
    if (!(seen >> k & 1)) continue;
    u32 word;  // 16 bits of it, or all
    if (is_whole) {
      word = args.dtype == kFloat32 ? raw[k / 4].word[k % 4] : raw[k / 8].word[k / 2 % 4] >> k % 2 * 16;
    } else if (args.dtype == kFloat32) {
      word = *reinterpret_cast<const u32*>(from + k * args.key * 4);
    } else {
      word = *reinterpret_cast<const u16*>(from + k * args.key * 2);
    }
    out[k] = args.dtype == kFloat32   ? __uint_as_float(word)
             : args.dtype == kFloat16 ? cvt_f32_f16(u16(word))
                                      : __uint_as_float(word << 16);
  }
}

extern "C" __global__ void __launch_bounds__(kBitsThreads) pack_biases(const __grid_constant__ PrepareArgs args) {
  __shared__ u32 of_keys[kRowLanes];
  const i64 plane = blockIdx.x / args.row_blocks;
  const i32 row_block = blockIdx.x % args.row_blocks;
  const i64 batch = plane / args.planes_a_batch, head = plane % args.planes_a_batch;
  const i64 list = batch * args.lists_a_batch + head / args.group, of_plane = batch * args.batch + head * args.head;
  const i32 lane = threadIdx.x % kRowLanes;
  for (int step = 0; step < kMaskRows / kRowsAtOnce; ++step) {
    const i32 of_block = step * kRowsAtOnce + threadIdx.x / kRowLanes;
    const i64 row = i64(row_block) * kMaskRows + of_block, at = of_plane + row * args.row;
    float largest = -kInfinity, x[kKeysALane];
    for (i32 tile = 0; tile < args.tiles; ++tile) {
      sixteen_biases(args, at, row, tile * TILE_KEYS + lane * kKeysALane, x);
#pragma unroll
      for (int k = 0; k < kKeysALane; ++k) largest = max_nan_f32(largest, x[k]);
    }
#pragma unroll
    for (int lanes = 1; lanes < kRowLanes; lanes *= 2) largest = max_nan_f32(largest, __shfl_xor_sync(0xFFFFFFFF, largest, lanes));
    const i64 place = (plane * args.row_blocks + row_block) * kMaskRows + of_block;
    if (lane == 0) args.row_seen[place] = largest != -kInfinity, args.row_bias[place] = largest;
  }
  __syncthreads();  // (each row's largest is there)
  for (i32 tile = 0; tile < args.tiles; ++tile) {
    if (threadIdx.x < kRowLanes) of_keys[threadIdx.x] = 0;
    __syncthreads();
    const i32 first_key = tile * TILE_KEYS + lane * kKeysALane;
    const i64 block = (plane * args.row_blocks + row_block) * args.tiles + tile;
    u32 of_mine = 0;
    for (int step = 0; step < kMaskRows / kRowsAtOnce; ++step) {
      const i32 of_block = step * kRowsAtOnce + threadIdx.x / kRowLanes;
      const i64 row = i64(row_block) * kMaskRows + of_block;
      const float largest = args.row_bias[(plane * args.row_blocks + row_block) * kMaskRows + of_block];
      float x[kKeysALane];
      sixteen_biases(args, of_plane + row * args.row, row, first_key, x);
#pragma unroll
      for (int k = 0; k < kKeysALane; ++k) {
        const bool hides = x[k] == -kInfinity || x[k] - largest < -kHidingBias;
        x[k] = hides ? -kInfinity : __fmul_rn(x[k] - largest, kLog2e);
        of_mine |= u32(!hides) << k;
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        u16* to = args.bias + block * (kMaskRows * TILE_KEYS) + bias_of_row(of_block, q) + lane * kNextRun;
        *reinterpret_cast<Vec8*>(to) = {cvt_f16x2_f32(x[2 * q + 1], x[2 * q]), cvt_f16x2_f32(x[8 + 2 * q + 1], x[8 + 2 * q])};
      }
    }
    if (of_mine) atomicOr(&of_keys[lane], of_mine);
    const bool any = __syncthreads_or(of_mine != 0);
    if (threadIdx.x == 0) args.tile_seen[block] = any;
    if (threadIdx.x < TILE_KEYS / 32) {
      const u32 word = of_keys[2 * threadIdx.x] | of_keys[2 * threadIdx.x + 1] << kKeysALane;
      u32* all = args.key_seen + (list * args.tiles + tile) * (TILE_KEYS / 32) + threadIdx.x;
      if (word & ~*all) atomicOr(all, word);
    }
    __syncthreads();
  }
}

// ---- a warp lists the tiles that some row of a work tile sees

extern "C" __global__ void __launch_bounds__(32) list_tiles(const __grid_constant__ PrepareArgs args) {
  const i64 plane = blockIdx.x / args.q_blocks;
  const i32 block = blockIdx.x % args.q_blocks, lane = threadIdx.x;
  const i32 first = args.row_blocks == 1 ? 0 : block * args.row_blocks_a_block;
  const i32 end = min(first + args.row_blocks_a_block, args.row_blocks);
  i32* out = args.tile_lists + i64(blockIdx.x) * (1 + args.tiles);
  i32 count = 0;
  for (i32 tile = lane; tile - lane < args.tiles; tile += 32) {
    bool sees = false;
    for (i32 i = first; i < end && tile < args.tiles; ++i) sees |= args.tile_seen[(plane * args.row_blocks + i) * args.tiles + tile];
    const u32 votes = __ballot_sync(0xFFFFFFFF, sees);
    if (sees) out[1 + count + __popc(votes & ((1u << lane) - 1))] = tile;
    count += __popc(votes);
  }
  if (lane == 0) out[0] = count;
}

// ---- masks that are said in a few numbers: row i sees keys i + first_offset to i + causal_offset, before kv_len and its
// sequence's length, with a bias that is the slope's share of the distance. Nothing is read but slopes and lengths.
//
// What a block of bits or biases holds follows from how far its first key is from its first row, and these 64s are its
// diagonal: tile · (TILE_KEYS / 64) − row block. A plane's blocks are its diagonals, the lowest first; then, if the last
// tile is not full, that tile for each row block, the last one first. (Rows behind the last see something in a block, and
// count nowhere: row_seen knows them.)

constexpr int kPlaceThreads = 256;

// −slope · distance, rounded as the tensor of biases would be. Slopes below 0 have no nearest key: NaN says so.
__device__ float bias_at(float slope, i32 distance) {
  return __fmul_rn(slope < 0 ? __uint_as_float(0x7FFFFFFF) : -slope, float(distance));
}
// Whether it hides, less the row's largest.
__device__ bool hides_at(float bias, float largest) {
  return bias == -kInfinity || __fsub_rn(bias, largest) < -kHidingBias;
}

struct Reach {  // row i sees keys i + low to i + high, as far as they count in softmax
  i64 low, high;
  float largest;  // of its biases, if it sees any
  __device__ Reach(const PrepareArgs& args, i64 batch, i64 head)
      : low(args.first_offset), high(args.causal_offset), largest(0.0f) {
    if (args.slopes == nullptr) return;
    const float slope = args.slopes[batch * args.batch + head * args.head];
    largest = bias_at(slope, args.nearest);
    i32 seen = -1, hidden = args.q_len + args.kv_len;  // the largest distance that is not hidden lies between
    while (hidden - seen > 1) {
      const i32 middle = seen + (hidden - seen) / 2;
      if (hides_at(bias_at(slope, middle), largest)) hidden = middle;
      else seen = middle;
    }
    low = max(low, i64(args.shift) - seen), high = min(high, i64(args.shift) + seen);
  }
  __device__ bool is_empty() const { return low > high; }
};

struct Range {  // of keys
  i64 first, last;
  // What rows [first_row, last_row] see.
  __device__ Range(const Reach& reach, i64 first_row, i64 last_row, i64 kv_len)
      : first(max(first_row + reach.low, i64(0))), last(min(last_row + reach.high, kv_len - 1)) {
    if (reach.is_empty() || last < first) last = first - 1;
  }
  __device__ i64 count() const { return last + 1 - first; }
};

// Everything but the bits and biases: blocks (plane, part of its rows and of its list's keys).
extern "C" __global__ void __launch_bounds__(kPlaceThreads) list_by_place(const __grid_constant__ PrepareArgs args) {
  const i64 plane = blockIdx.x, batch = plane / args.planes_a_batch, head = plane % args.planes_a_batch;
  const i64 list = batch * args.lists_a_batch + head / args.group;
  const Reach mine(args, batch, head);
  Reach any = mine;  // of the planes that share the list: each sees less than another, or the same
  const bool has_list = head % args.group == 0;
  for (i32 i = 1; i < args.group && has_list; ++i) {
    const Reach other(args, batch, head + i);
    if (any.is_empty() || other.low < any.low || other.high > any.high) any = other.is_empty() ? any : other;
  }
  i64 end = args.kv_len;
  if (args.kv_lens != nullptr) {
    const i64 length = args.long_lens ? static_cast<const i64*>(args.kv_lens)[batch * args.batch]
                                      : static_cast<const i32*>(args.kv_lens)[batch * args.batch];
    end = max(min(length, end), i64(0));
  }
  const Range keys(any, 0, args.q_len - 1, end);
  const i32 rows = args.row_seen == nullptr ? 0 : args.row_blocks * kMaskRows, q_rows = args.row_blocks_a_block * kMaskRows;
  const i64 count = max(rows, args.tiles * TILE_KEYS);
  for (i64 i = blockIdx.y * i64(kPlaceThreads) + threadIdx.x; i < count; i += gridDim.y * i64(kPlaceThreads)) {
    if (i < rows) {
      const bool sees = i < args.q_len && Range(mine, i, i, args.kv_len).count() > 0;
      args.row_seen[plane * rows + i] = sees;
      if (args.row_bias != nullptr) args.row_bias[plane * rows + i] = sees ? mine.largest : -kInfinity;
      if (i % q_rows == 0) {
        const Range seen(mine, i, min(i + q_rows, i64(args.q_len)) - 1, args.kv_len);
        i32* out = args.tile_lists + (plane * args.q_blocks + i / q_rows) * 2;
        out[1] = i32(seen.first / TILE_KEYS);
        out[0] = seen.count() > 0 ? i32(seen.last / TILE_KEYS) + 1 - out[1] : 0;
      }
    }
    if (!has_list) continue;
    if (i == 0) args.key_counts[list] = i32(keys.count());
    if (i < keys.count()) args.keys[list * args.kv_len + i] = i32(keys.first + i);
    if (rows > 0 && i < args.tiles * (TILE_KEYS / 32)) {
      const i64 low = keys.first - 32 * i, high = keys.last - 32 * i;
      args.key_seen[list * args.tiles * (TILE_KEYS / 32) + i] = range_of_sixteen(low, high) | range_of_sixteen(low - 16, high - 16) << 16;
    }
  }
}

// A block packs one of a plane's.
extern "C" __global__ void __launch_bounds__(kBitsThreads) pack_diagonals(const __grid_constant__ PrepareArgs args) {
  const i64 plane = blockIdx.x / args.blocks;
  const i32 block = blockIdx.x % args.blocks;
  const bool is_last = block >= args.diagonals;  // of the last tile, with its end
  const i32 keys = is_last ? args.kv_len - (args.tiles - 1) * TILE_KEYS : TILE_KEYS;
  const i64 diagonal = (is_last ? block - args.row_blocks : block) - (args.row_blocks - 1);
  const i32 lane = threadIdx.x % kRowLanes, first_key = lane * kKeysALane;
  float slope = 0.0f, largest = 0.0f;
  if (args.slopes != nullptr) {
    slope = args.slopes[plane / args.planes_a_batch * args.batch + plane % args.planes_a_batch * args.head];
    largest = bias_at(slope, args.nearest);
  }
  for (int step = 0; step < kMaskRows / kRowsAtOnce; ++step) {
    const i32 row = step * kRowsAtOnce + threadIdx.x / kRowLanes;
    const i64 apart = diagonal * kMaskRows + first_key - row;  // the first key from the row
    const u32 seen = range_of_sixteen(args.first_offset - apart, min(args.causal_offset - apart, i64(keys) - 1 - first_key));
    const i64 place = (i64(blockIdx.x) * kMaskRows + row) * 4;
    if (args.slopes == nullptr) {
      const u32 word = word_of_lanes(seen, lane);
      if (lane < 4) *(args.bits + place + lane) = MaskWord(word);
      continue;
    }
    float x[kKeysALane];
#pragma unroll
    for (int k = 0; k < kKeysALane; ++k) {
      const i32 distance = i32(args.shift - apart - k);
      const float bias = bias_at(slope, max(distance, -distance));
      x[k] = seen >> k & 1 && !hides_at(bias, largest) ? __fmul_rn(__fsub_rn(bias, largest), kLog2e) : -kInfinity;
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      u16* to = args.bias + i64(blockIdx.x) * (kMaskRows * TILE_KEYS) + bias_of_row(row, q) + lane * kNextRun;
      *reinterpret_cast<Vec8*>(to) = {cvt_f16x2_f32(x[2 * q + 1], x[2 * q]), cvt_f16x2_f32(x[8 + 2 * q + 1], x[8 + 2 * q])};
    }
  }
}
