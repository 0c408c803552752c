// The producer warpgroup: one thread copies tiles, three warps quantise the rows of Q of the next piece of work.
#pragma once
#include "attend/quantize_q.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"
#include "wgmma/block.cuh"

// Stage i of a piece of work holds K's tile i and V's tile i − 1: what a consumer needs at the same time.
__device__ void copy_tiles(const AttentionArgs& args, Shared& shared) {
  Ring<kStages> ring;
  Ring<2> q_ring;
  for (i32 item = blockIdx.x; item < args.items; item += gridDim.x, q_ring.next()) {
    const Piece work = work_of(args, item);
    const i32 count = tiles_of(args, work.first_row, kConsumers * kRows, work).count;
    const i64 head = i64(work.batch) * args.kv_heads + work.kv_head, first = head * args.tiles + first_tile(work);
    constexpr u32 kChannelBytes = sizeof(shared.v_scale[0]);
    mbarrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1);
    shared.piece[q_ring.stage] = work;
    mbarrier_arrive_expect_tx(&shared.q_full[q_ring.stage], 2 * kChannelBytes);
    cp_async_bulk_shared_global(shared.v_scale[q_ring.stage], args.v_scale + head * kDim, kChannelBytes,
                                &shared.q_full[q_ring.stage]);
    cp_async_bulk_shared_global(shared.v_mean[q_ring.stage], args.v_mean + head * kDim, kChannelBytes,
                                &shared.q_full[q_ring.stage]);
    for (i32 tile = 0; count > 0 && tile <= count; ++tile, ring.next()) {
      const int s = ring.stage;
      const u32 k_bytes = tile < count ? kTileBytes + sizeof(shared.k_scale[s]) : 0;
      mbarrier_wait(&shared.empty[s], ring.parity ^ 1);
      mbarrier_arrive_expect_tx(&shared.full[s], k_bytes + (tile > 0 ? kTileBytes : 0));
      if (tile < count) {
        const i64 at = first + tile;
        cp_async_bulk_shared_global(shared.k[s], args.k_tiles + at * kTileBytes, kTileBytes, &shared.full[s]);
        cp_async_bulk_shared_global(shared.k_scale[s], args.k_scales + at * 4, sizeof(shared.k_scale[s]),
                                    &shared.full[s]);
      }
      if (tile > 0) {
        cp_async_bulk_shared_global(shared.v[s], args.v_tiles + (first + tile - 1) * kTileBytes, kTileBytes,
                                    &shared.full[s]);
      }
    }
  }
}

// The rows of Q of a piece of work, by `kWarps` warps of which this is number `warp`.
template <int kWarps>
__device__ void quantize_queries(const AttentionArgs& args, Shared& shared, const Piece& work, int stage, int warp) {
  // Eight lanes of two rows have 16 registers of 16-bit channels, which fit in 80 (BF16's, whose conversion is a shift) but
  // not in 72; FP32 takes twice that.
  constexpr int kLanes = kDim == 128 && (kInput != kBFloat16 || kConsumers == 2) ? 16 : 8;
  const i64 base = i64(work.batch) * args.q.batch + i64(work.head) * args.q.head + i64(work.first_row) * args.q.token;
  const float* mean = args.lse == nullptr ? nullptr : args.k_mean + (i64(work.batch) * args.kv_heads + work.kv_head) * kDim;
  quantize_rows<kInput, kDim, kWarps, kLanes>(args.q, base, work.end_row - work.first_row, args.channels, args.sm_scale,
                                              args.logits_scale, mean, warp,
                                              {shared.q[stage], shared.q_scale[stage], shared.mean_logit[stage]});
  fence_proxy_async();
}

// The block's first piece of work, while it has nothing else to do: all warps, before they take their roles.
__device__ void quantize_first_queries(const AttentionArgs& args, Shared& shared) {
  quantize_queries<kThreads / 32>(args, shared, work_of(args, blockIdx.x), 0, threadIdx.x / 32);
}

__device__ void quantize_other_queries(const AttentionArgs& args, Shared& shared) {
  Ring<2> ring;
  for (i32 item = blockIdx.x; item < args.items; item += gridDim.x, ring.next()) {
    const Piece work = work_of(args, item);
    mbarrier_wait(&shared.q_empty[ring.stage], ring.parity ^ 1);
    if (item != blockIdx.x) quantize_queries<kQueryWarps>(args, shared, work, ring.stage, threadIdx.x / 32 - 1);
    shared.k_largest_scale[ring.stage] = args.k_largest_scale[i64(work.batch) * args.kv_heads + work.kv_head];
    mbarrier_arrive(&shared.q_full[ring.stage]);
  }
}
