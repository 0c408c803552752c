// A warp's 16 rows of the output on their way to the caller.
#pragma once
#include "common/epilogue.cuh"
#include "hopper/block.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"

#if ROWS_THROUGH_SHARED
// Until the rows sent last have left the warp's part of shared memory, and all its lanes know.
__device__ __forceinline__ void await_rows_sent() {
  cp_async_bulk_wait_group_read<0>();
  __syncwarp();
}

// By the copy engine, through the warp's part of shared memory: a lane has two channels at a time of a row, and such stores
// would take longer than two tiles. `first`: the token of the first row.
__device__ __forceinline__ void send_rows(const AttentionArgs& args, const WorkTile& work, const Vec16 (&part)[kDim / 8][32],
                                          i32 first, const u32 (&y)[kDim / 8][2]) {
  // From row to row: a chunk more than it has, so that eight rows' equal chunks lie in different banks.
  constexpr int kPitch = kDim * 2 + 16;
  static_assert(16 * kPitch <= int(sizeof(part)), "a warp's rows do not fit in its part");
  const u32 lane = threadIdx.x % 32, at = shared_address(part);
  await_rows_sent();  // (and all lanes have read O)
#pragma unroll
  for (int i = 0; i < kDim / 8; i += 2) {
    stmatrix_m8n8_x4(at + lane % 16 * kPitch + (i + lane / 16) * 16, y[i][0], y[i][1], y[i + 1][0], y[i + 1][1]);
  }
  fence_proxy_async();
  __syncwarp();
  const i32 token = first + i32(lane);
  if (lane < 16 && token < work.end_row) {
    const i64 to = Sequence{args, work}.in_output(token);
    cp_async_bulk_global_shared(static_cast<u16*>(args.out) + to, at + lane * kPitch, args.v_channels * 2);
  }
  cp_async_bulk_commit_group();
}
#else
__device__ __forceinline__ void await_rows_sent() {}
#endif
