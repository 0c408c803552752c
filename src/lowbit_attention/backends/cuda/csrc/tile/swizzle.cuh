// How the tiles that the tensor cores read lie in memory, packed and shared alike.
//
// A tile is rows of 32 to 256 bytes, their 16-byte chunks exchanged so that eight rows' equal chunks lie in different
// banks. tests/cpu/cuda/test_layout.py proves these maps against the MMA's own order.
#pragma once
#include "ptx/types.cuh"

// Keys a tile. wgmma: 128, the widest whose 64 sums a thread leave room for O and P·V's sums; mma.sync: 64, the papers'.
constexpr int kTileKeys = TILE_KEYS;

// Byte offset of a row's 16-byte chunk. Rows of 128 and 64 bytes lie as wgmma's swizzles want them; all of them so that
// eight neighbouring rows' equal chunks fill the 128 bytes that shared memory delivers at once.
template <int kRowBytes>
__device__ constexpr int swizzled(int row, int chunk) {
  static_assert(kRowBytes == 256 || kRowBytes == 128 || kRowBytes == 64 || kRowBytes == 32, "no such swizzle");
  const int moved = kRowBytes >= 128 ? chunk ^ (row % 8) : kRowBytes == 64 ? chunk ^ (row / 2 % 4) : chunk ^ (row / 4 % 2);
  return row * kRowBytes + moved * 16;
}

// The descriptor of a swizzled tile at 16 · `address` in shared memory; add 2 for the next 32 bytes of every row.
template <int kRowBytes>
__device__ u64 wgmma_descriptor(u32 address) {
  constexpr u32 kLayout = kRowBytes == 128 ? 1 : 2;  // 128-byte or 64-byte swizzle
  constexpr u32 kEightRows = 8 * kRowBytes / 16;     // from one group of eight rows to the next, in 16 bytes
  return u64(kEightRows | kLayout << 30) << 32 | address | 1u << 16;
}
constexpr u64 kDescriptorStep = 2;

// P's registers hold, of 16 keys, the quad's keys 2q, 2q+1, 8+2q, 8+2q+1 where the FP8 MMA expects 4q … 4q+3. So V's
// tokens are stored in this order: position p holds token kTokenOrder[p].
__device__ constexpr int kTokenOrder[16] = {0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15};
