// Masks that are said in a few numbers: row i sees keys i + first_offset to i + causal_offset, before kv_len and its
// sequence's length, with a bias that is the slope's share of the distance. Nothing is read but slopes and lengths.
//
// What a block of bits or biases holds follows from how far its first key is from its first row, and these 64s are its
// diagonal: tile · (TILE_KEYS / 64) − row block. A plane's blocks are its diagonals, the lowest first; then, if the last
// tile is not full, that tile for each row block, the last one first. (Rows behind the last see something in a block, and
// count nowhere: row_seen knows them.)

#pragma once
#include "mask/arguments.cuh"
#include "mask/rows.cuh"

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

// A warp packs one of a plane's blocks.
extern "C" __global__ void __launch_bounds__(kPackThreads) pack_diagonals(const __grid_constant__ PrepareArgs args) {
  const i32 thread_blocks = (args.blocks + kPackWarps - 1) / kPackWarps;  // of a plane
  const i64 plane = blockIdx.x / thread_blocks;
  const i32 block = blockIdx.x % thread_blocks * kPackWarps + threadIdx.x / 32;
  if (block >= args.blocks) return;
  const i64 number = plane * args.blocks + block;
  const bool is_last = block >= args.diagonals;  // of the last tile, with its end
  const i32 keys = is_last ? args.kv_len - (args.tiles - 1) * TILE_KEYS : TILE_KEYS;
  const i64 diagonal = (is_last ? block - args.row_blocks : block) - (args.row_blocks - 1);
  const PackLane mine;
  float slope = 0.0f, largest = 0.0f;
  if (args.slopes != nullptr) {
    slope = args.slopes[plane / args.planes_a_batch * args.batch + plane % args.planes_a_batch * args.head];
    largest = bias_at(slope, args.nearest);
  }
  for (int first = 0; first < kSteps; first += 2) {
    u32 seen[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const i64 apart = diagonal * kMaskRows + mine.first_key - mine.row(first + i);  // the first key from the row
      seen[i] = range_of_sixteen(args.first_offset - apart, min(args.causal_offset - apart, i64(keys) - 1 - mine.first_key));
      if (args.slopes == nullptr) continue;
      float x[kKeysALane];
#pragma unroll
      for (int k = 0; k < kKeysALane; ++k) {
        const i32 distance = i32(args.shift - apart - k);
        const float bias = bias_at(slope, max(distance, -distance));
        x[k] = seen[i] >> k & 1 && !hides_at(bias, largest) ? __fmul_rn(__fsub_rn(bias, largest), kLog2e) : -kInfinity;
      }
      store_biases(args.bias + number * (kMaskRows * TILE_KEYS), mine, first + i, x);
    }
    if (args.slopes == nullptr) store_words(args.bits + number * (kMaskRows * 4), mine, first, seen[0], seen[1]);
  }
}
