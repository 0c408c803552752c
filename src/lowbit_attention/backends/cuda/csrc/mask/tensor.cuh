// Masks and biases that are tensors.
#pragma once
#include "mask/arguments.cuh"
#include "mask/rows.cuh"
#include "ptx/copy.cuh"
#include "tile/strided.cuh"

constexpr int kTilesABlock = 16;  // of threads
constexpr int kLoads = 8;         // of 16 bytes, that a lane has under way

// Bit k: whether byte k is not 0.
__device__ u32 bits_of_bytes(const Vec16& bytes) {
  u32 nonzero[4];  // of each byte the highest bit
#pragma unroll
  for (int i = 0; i < 4; ++i) nonzero[i] = ((bytes.word[i] & 0x7F7F7F7F) + 0x7F7F7F7F | bytes.word[i]) & 0x80808080;
  // The product brings bits 0 of four bytes to bits 24 to 27, and their bits 4 to bits 28 to 31.
  const u32 low = (nonzero[0] >> 7 | nonzero[1] >> 3) * 0x01020408 >> 24;
  const u32 high = (nonzero[2] >> 7 | nonzero[3] >> 3) * 0x01020408 >> 24;
  return low | high << 8;
}

// 64 rows of a plane.
struct RowBlock {
  i64 number, plane, batch, head, list, first_row;
  __device__ RowBlock(const PrepareArgs& args)
      : number(blockIdx.x), plane(number / args.row_blocks), batch(plane / args.planes_a_batch),
        head(plane % args.planes_a_batch), list(batch * args.lists_a_batch + head / args.group),
        first_row(number % args.row_blocks * kMaskRows) {}
  __device__ i64 at(const PrepareArgs& args) const { return batch * args.batch + head * args.head + first_row * args.row; }
};

// How a tile lies to what a block's rows see by their place (causality, a window, the end).
struct Place {
  bool some, all;
  __device__ Place(const PrepareArgs& args, i64 first_row, i32 tile) {
    const i64 first = i64(tile) * TILE_KEYS, last = first + TILE_KEYS - 1, end = i64(args.kv_len) - 1;
    const i64 last_row = first_row + kMaskRows - 1, last_used = min(last_row, i64(args.q_len) - 1);
    some = first <= min(last_used + args.causal_offset, end) && last >= first_row + args.first_offset;
    all = last <= min(first_row + args.causal_offset, end) && first >= last_row + args.first_offset && last_used == last_row;
  }
};

// Of sixteen keys, those that a row sees by where they stand. (Rows behind the last see none. Where all rows are alike and
// have one block, every row finds itself among the first.)
__device__ u32 seen_by_place(const PrepareArgs& args, i64 row, i64 first_key) {
  if (row >= args.q_len || first_key >= args.kv_len) return 0;
  const i64 high = min(row + args.causal_offset, i64(args.kv_len) - 1) - first_key;
  return range_of_sixteen(row + args.first_offset - first_key, high);
}

// Of sixteen keys of a row, where `asked` says so: whether the mask shows them.
__device__ u32 sixteen_keys(const u8* from, i64 step, u32 asked) {
  if (asked == 0xFFFF && step == 1 && !(reinterpret_cast<u64>(from) & 15)) return bits_of_bytes(ld_global_nc_v4(from));
  u32 out = 0;
  for (int i = 0; i < kKeysALane; ++i) {
    if (asked >> i & 1) out |= u32(from[i * step] != 0) << i;
  }
  return out;
}

// What a warp has seen of a tile's keys in a block's rows, sixteen bits a lane.
__device__ void note_tile(const PrepareArgs& args, const RowBlock& rows, i32 tile, const PackLane& mine, u32 of_keys) {
#pragma unroll
  for (int lanes = kRowLanes; lanes < 32; lanes *= 2) of_keys |= __shfl_xor_sync(0xFFFFFFFF, of_keys, lanes);
  const u32 word = of_keys | __shfl_xor_sync(0xFFFFFFFF, of_keys, 1) << kKeysALane;  // (in even lanes)
  const bool any = __any_sync(0xFFFFFFFF, of_keys != 0);
  if (threadIdx.x % 32 == 0) args.tile_seen[rows.number * args.tiles + tile] = any;
  if (mine.first_row != 0 || mine.lane % 2 != 0) return;
  u32* all = args.key_seen + (rows.list * args.tiles + tile) * (TILE_KEYS / 32) + mine.lane / 2;
  if (word & ~*all) atomicOr(all, word);
}

// ---- a warp packs the bits of 64 rows and a key tile

extern "C" __global__ void __launch_bounds__(kPackThreads, 2) pack_bits(const __grid_constant__ PrepareArgs args) {
  const RowBlock rows(args);
  const PackLane mine;
  const u8* mask = static_cast<const u8*>(args.mask) + rows.at(args);
  const bool has_vectors = args.key == 1 && !((reinterpret_cast<u64>(mask) | u64(args.row)) & 15);
  const i32 first_tile = blockIdx.y * kTilesABlock, end_tile = min(first_tile + kTilesABlock, args.tiles);
  u32 row_any[kSteps] = {};
  for (i32 tile = first_tile + i32(threadIdx.x / 32); tile < end_tile; tile += kPackWarps) {
    const Place place(args, rows.first_row, tile);
    const i64 first_key = i64(tile) * TILE_KEYS + mine.first_key;
    MaskWord* block = args.bits + (rows.number * args.tiles + tile) * (kMaskRows * 4);
    u32 of_keys = 0;
#pragma unroll
    for (int first = 0; first < kSteps; first += kLoads) {
      u32 seen[kLoads];
      if (place.all && has_vectors) {
        Vec16 bytes[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) bytes[i] = ld_global_nc_v4(mask + mine.row(first + i) * args.row + first_key);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) seen[i] = bits_of_bytes(bytes[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
          const i64 row = mine.row(first + i);
          seen[i] = place.some ? seen_by_place(args, rows.first_row + row, first_key) : 0;
          if (seen[i]) seen[i] &= sixteen_keys(mask + row * args.row + first_key * args.key, args.key, seen[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) of_keys |= seen[i], row_any[first + i] |= seen[i];
#pragma unroll
      for (int i = 0; i < kLoads; i += 2) store_words(block, mine, first + i, seen[i], seen[i + 1]);
    }
    note_tile(args, rows, tile, mine, of_keys);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (row_any[step]) args.row_seen[rows.number * kMaskRows + mine.row(step)] = 1;
  }
}

// ---- biases: a warp finds a row's largest; then a warp packs those of 64 rows and a key tile, less the largest of each

// Key first + k of a row, in `out[k]`; −∞ where it is hidden by its place.
__device__ void sixteen_biases(const PrepareArgs& args, i64 row_at, i64 row, i64 first, float (&out)[kKeysALane]) {
  const u32 seen = seen_by_place(args, row, first);
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

extern "C" __global__ void __launch_bounds__(kPackThreads) largest_biases(const __grid_constant__ PrepareArgs args) {
  const RowBlock rows(args);
  const i32 row = blockIdx.y * kPackWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  float largest = -kInfinity, x[kKeysALane];
  for (i64 first = 0; first < args.kv_len; first += 32 * kKeysALane) {
    sixteen_biases(args, rows.at(args) + row * args.row, rows.first_row + row, first + lane * kKeysALane, x);
#pragma unroll
    for (int k = 0; k < kKeysALane; ++k) largest = max_nan_f32(largest, x[k]);
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) largest = max_nan_f32(largest, __shfl_xor_sync(0xFFFFFFFF, largest, lanes));
  if (lane != 0) return;
  args.row_seen[rows.number * kMaskRows + row] = largest != -kInfinity;
  args.row_bias[rows.number * kMaskRows + row] = largest;
}

extern "C" __global__ void __launch_bounds__(kPackThreads, 2) pack_biases(const __grid_constant__ PrepareArgs args) {
  const RowBlock rows(args);
  const PackLane mine;
  const i32 first_tile = blockIdx.y * kTilesABlock, end_tile = min(first_tile + kTilesABlock, args.tiles);
  for (i32 tile = first_tile + i32(threadIdx.x / 32); tile < end_tile; tile += kPackWarps) {
    u16* block = args.bias + (rows.number * args.tiles + tile) * (kMaskRows * TILE_KEYS);
    u32 of_keys = 0;
#pragma unroll 2
    for (int step = 0; step < kSteps; ++step) {
      const i64 row = mine.row(step);
      const float largest = args.row_bias[rows.number * kMaskRows + row];
      float x[kKeysALane];
      sixteen_biases(args, rows.at(args) + row * args.row, rows.first_row + row, i64(tile) * TILE_KEYS + mine.first_key, x);
#pragma unroll
      for (int k = 0; k < kKeysALane; ++k) {
        const bool hides = x[k] == -kInfinity || x[k] - largest < -kHidingBias;
        x[k] = hides ? -kInfinity : __fmul_rn(x[k] - largest, kLog2e);
        of_keys |= u32(!hides) << k;
      }
      store_biases(block, mine, step, x);
    }
    note_tile(args, rows, tile, mine, of_keys);
  }
}
