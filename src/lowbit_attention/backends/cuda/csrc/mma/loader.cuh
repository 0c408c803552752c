// How tiles come from memory: a thread of attention_mma copies its share of each.
#pragma once
#include "mma/block.cuh"
#include "ptx/copy.cuh"

// Begins the copies of a key tile; the threads' addresses are apart by 16 bytes.
struct Loader {
  const u8* mine;          // in global memory, of the next tile
  u32 to_scale;            // from there to the thread's scale of K: a second pointer would take two additions more
  u32 to;                  // in shared memory, in the first stage
#if LISTS_TILES
  const MaskArgs& mask;
  const i32* list;         // of the tiles that come
  i32 come = 0;            // how many have
#endif
#if SMOOTH_Q
  const u8* delta;
  u32 to_delta;
#endif
  // A warp copies neighbouring bytes; `mine` is the middle of them, which offsets of ±2 KB reach.
  static constexpr int kWarpBytes = (kKTileBytes + kVTileBytes) / kWarps, kMiddle = kWarpBytes / 2;
  static_assert(kWarpBytes <= 4096 && kWarpBytes % 512 == 0, "what an instruction's offset reaches");
  static_assert(kWarpBytes - kMiddle > 31 * 16, "the scales lie behind every thread's place");

  __device__ __forceinline__ Loader(const MmaArgs& args, Shared& shared, const Work& work)
#if LISTS_TILES
      : mask(args.mask)
#endif
  {
    const i64 first = first_tile_of(args, work);
    const u32 place = threadIdx.x / 32 * kWarpBytes + threadIdx.x % 32 * 16 + kMiddle;
    mine = args.tiles + first * sizeof(PackedTile) + place;
    to = shared_address(&shared.stages[0]) + place;
#if LISTS_TILES
    list = tile_list(args, work);
#endif
    to_scale = u32(u64(kKTileBytes + kVTileBytes) + threadIdx.x % 4 * sizeof(float)) - place;  // they follow K and V
    pin_register(to);
#if SMOOTH_Q
    const i64 query_tile = i64(blockIdx.x) * kGroups + threadIdx.x / 16 % kGroups;
    delta = reinterpret_cast<const u8*>(args.delta + query_tile * args.tile_count * kTileKeys) + threadIdx.x % 16 * 16;
    to_delta = shared_address(shared.stages[0].delta) + threadIdx.x % (16 * kGroups) * 16;
    pin_register(to_delta);
#endif
  }
  // `stage`: from the first stage to that of the tile. Returns the thread's scale of K.
  __device__ __forceinline__ float next(u32 stage) {
    pin_register(mine), pin_register(to_scale);  // (here, so that to_scale is not kept as 64 bits)
#if LISTS_TILES
    const i64 tile = mask.tile_at(list, come++);
    const u8* mine = this->mine + tile * sizeof(PackedTile);
#endif
#pragma unroll
    for (int i = -kMiddle; i < kMiddle; i += 512) cp_async_cg_16(to + stage + i, mine + i);
    const float k_scale = ld_global_f32(reinterpret_cast<const float*>(mine + to_scale));
#if !LISTS_TILES
    mine += sizeof(PackedTile);
#endif
#if SMOOTH_Q
#if LISTS_TILES
    cp_async_cg_16(to_delta + stage, delta + tile * kTileKeys * sizeof(float));
#else
    cp_async_cg_16(to_delta + stage, delta);
    delta += kTileKeys * sizeof(float);
#endif
#endif
    return k_scale;
  }
};
