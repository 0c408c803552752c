// A caller's mask to what the kernels read (common/masks.cuh): lists of the keys that some row sees, or bits.
//
//   a mask that is the same for all rows:  list_keys
//   any other:                             pack_bits, list_tiles, list_keys (of what pack_bits has seen)
//   biases:                                largest_biases, pack_biases, and the same
//   said in a few numbers:                 list_by_place, pack_diagonals
//
// Compiled for: TILE_KEYS 128 (wgmma) or 64 (mma.sync).
#include "mask/arguments.cuh"
#include "mask/by_place.cuh"
#include "mask/tensor.cuh"

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
