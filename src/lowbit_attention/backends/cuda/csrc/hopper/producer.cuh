// The producer warpgroup: one thread copies tiles; three warps take the next work tile and quantize its rows of Q.
#pragma once
#include "hopper/block.cuh"
#include "hopper/multiply.cuh"
#include "hopper/quantize_q.cuh"
#include "ptx/barrier.cuh"
#include "ptx/copy.cuh"

#if TAKES_WORK
// Thread blocks take work tiles as they come to need them: which is longest is the order's business (Schedule), and
// who is late takes fewer. The next is taken when so many tiles of the present one are left to be copied, which is
// time enough for its rows of Q; taken earlier, it might have been another's sooner.
constexpr i32 kTilesAhead = 8;

__device__ inline WorkTile next_work(const AttentionArgs& args) {
  const u32 before = atom_inc_acq_rel_gpu(args.taken);
  if (before == u32(items_of(args) - 1)) *args.taken = 0;  // every block has asked in vain: for the next launch
  const u32 item = gridDim.x + before;
  if (item < u32(items_of(args))) return work_of(args, item);
  WorkTile none = {};
  none.end_row = -1;
  return none;
}
#endif

// Stage i of a work tile holds K's tile i and V's tile i − 1: what a consumer needs at the same time.
__device__ void copy_tiles(const AttentionArgs& args, Shared& shared) {
  Ring<kStages> ring;
#if TAKES_WORK
  for (Ring<2> q_ring;; q_ring.next()) {
    mbarrier_wait(&shared.work_full[q_ring.stage], q_ring.parity);
    const WorkTile work = shared.work[q_ring.stage];
    if (work.end_row < 0) return mbarrier_arrive(&shared.q_full[q_ring.stage]);
#else
  Ring<2> q_ring;
  for (i32 item = blockIdx.x; item < items_of(args); item += gridDim.x, q_ring.next()) {
    const WorkTile work = work_of(args, item);
#endif
    const i32 count = tiles_of(args, work.first_row, kConsumers * kRows, work).count;
    const i64 head = i64(work.batch) * args.kv_heads + work.kv_head;
#if SEQUENCES
    const i64 first = first_tile_of_sequence(args, work);
#elif LISTS_TILES
    const i64 first = head * args.tiles;  // (the list says the rest)
#else
    const i64 first = head * args.tiles + first_tile(work);
#endif
    constexpr u32 kChannelBytes = sizeof(shared.v_scale[0]);
#if TILE_MEANS
    constexpr u32 kMeanBytes = 2 * kDim, kValueBytes = kTileBytes + kOnesBytes + kMeanBytes;
#else
    constexpr u32 kValueBytes = kTileBytes;
#endif
#if !TAKES_WORK
    mbarrier_wait(&shared.q_empty[q_ring.stage], q_ring.parity ^ 1);
    shared.work[q_ring.stage] = work;
#endif
    mbarrier_arrive_expect_tx(&shared.q_full[q_ring.stage], 2 * kChannelBytes);
    cp_async_bulk_shared_global(shared.v_scale[q_ring.stage], args.v_scale + head * kDim, kChannelBytes,
                                &shared.q_full[q_ring.stage]);
    cp_async_bulk_shared_global(shared.v_mean[q_ring.stage], args.v_mean + head * kDim, kChannelBytes,
                                &shared.q_full[q_ring.stage]);
#if TAKES_WORK
    const i32 late = max(count - kTilesAhead, 0);
    if (count == 0) mbarrier_arrive(&shared.next_wanted);
#endif
#if LISTS_TILES
    const i32* list = tile_list(args, work);
    const i32 of_rows = i32(mask_block(args, work)) * args.mask.row_step + args.mask.block_of_plane(work.batch, work.head);
    i32 before = 0;  // the tile whose V comes
#endif
    for (i32 tile = 0; count > 0 && tile <= count; ++tile, ring.next()) {
      const int s = ring.stage;
#if LISTS_TILES
      const i32 of_keys = tile < count ? args.mask.tile_at(list, first_tile(work) + tile) : 0, of_values = before;
      before = of_keys;
#else
      const i32 of_keys = tile, of_values = tile - 1;
#endif
#if TAKES_WORK
      if (tile == late) mbarrier_arrive(&shared.next_wanted);
#endif
      const u32 k_bytes = tile < count ? kTileBytes + sizeof(shared.k_scale[s]) : 0;
      mbarrier_wait(&shared.empty[s], ring.parity ^ 1);
#if LISTS_TILES
      shared.tile_block[q_ring.stage][tile % kTileSlots] = of_rows + args.mask.block_of_tile(of_keys);
#endif
      mbarrier_arrive_expect_tx(&shared.full[s], k_bytes + (tile > 0 ? kValueBytes : 0));
      if (tile < count) {
        const i64 at = first + of_keys;
        cp_async_bulk_shared_global(shared.k[s], args.k_tiles + at * kTileBytes, kTileBytes, &shared.full[s]);
        cp_async_bulk_shared_global(shared.k_scale[s], args.k_scales + at * 4, sizeof(shared.k_scale[s]),
                                    &shared.full[s]);
      }
      if (tile > 0) {
        cp_async_bulk_shared_global(shared.v[s], args.v_tiles + (first + of_values) * kTileBytes, kTileBytes,
                                    &shared.full[s]);
#if TILE_MEANS
        cp_async_bulk_shared_global(shared.v[s] + kTileBytes, ones_of_tile(tile - 1), kOnesBytes, &shared.full[s]);
        cp_async_bulk_shared_global(shared.tile_means[q_ring.stage][(tile - 1) % kMeanSlots],
                                    args.v_tile_means + (first + of_values) * kDim, kMeanBytes, &shared.full[s]);
#endif
      }
    }
  }
}

// The rows of Q of a work tile, by `kWarps` warps of which this is number `warp`.
template <int kWarps>
__device__ void quantize_queries(const AttentionArgs& args, Shared& shared, const WorkTile& work, int stage, int warp) {
  const Sequence sequence{args, work};
  const i64 base = sequence.in_q(work.first_row);
  const float* mean = args.lse == nullptr ? nullptr : args.k_mean + sequence.kv_head() * kDim;
  quantize_rows<kInput, kDim, kWarps, kQueryLanes>(args.q, base, work.end_row - work.first_row, args.channels, args.sm_scale,
                                              args.logits_scale, mean, warp, RowsSeen(args, work),
                                              {shared.q[stage], shared.q_scale[stage], shared.mean_logit[stage],
                                               shared.spoilt[stage]});
  fence_proxy_async();
}

// The block's first work tile, while it has nothing else to do: all warps, before they take their roles.
__device__ void quantize_first_queries(const AttentionArgs& args, Shared& shared) {
  quantize_queries<kThreads / 32>(args, shared, work_of(args, blockIdx.x), 0, threadIdx.x / 32);
}

#if TAKES_WORK
// Waits by looking now and then: a warp in mbarrier_wait wakes at whatever happens to any barrier of the block, some 20
// times a tile, and what it issues is missing elsewhere.
__device__ void wait_at_leisure(u64* barrier, u32 parity) {
  constexpr u32 kNanoseconds = 100;  // at most twice that: an eighth of a tile's round
  while (!mbarrier_test_wait_parity(barrier, parity)) nanosleep(kNanoseconds);
}

// By three warps; one of their threads takes the work tiles.
__device__ void quantize_other_queries(const AttentionArgs& args, Shared& shared) {
  Ring<2> ring;
  for (bool is_first = true;; is_first = false, ring.next()) {
    if (threadIdx.x == 32) {  // (one thread alone: another might miss a whole phase of next_wanted, if work tiles are short)
      wait_at_leisure(&shared.next_wanted, ring.stage ^ 1);  // (the first is wanted at once)
      wait_at_leisure(&shared.q_empty[ring.stage], ring.parity ^ 1);
      if (is_first) shared.work[0] = work_of(args, blockIdx.x);
      else shared.work[ring.stage] = next_work(args);
      mbarrier_arrive(&shared.work_full[ring.stage]);
    }
    __syncwarp();
    bar_sync(kWorkTileBarrier, 32 * kQueryWarps);  // (it is there)
    const WorkTile work = shared.work[ring.stage];
    if (work.end_row < 0) return mbarrier_arrive(&shared.q_full[ring.stage]);
    shared.k_largest_scale[ring.stage] = args.k_largest_scale[Sequence{args, work}.kv_head()];
    if (!is_first) quantize_queries<kQueryWarps>(args, shared, work, ring.stage, threadIdx.x / 32 - 1);
    mbarrier_arrive(&shared.q_full[ring.stage]);
  }
}
#else
__device__ void quantize_other_queries(const AttentionArgs& args, Shared& shared) {
  Ring<2> ring;
  for (i32 item = blockIdx.x; item < items_of(args); item += gridDim.x, ring.next()) {
    const WorkTile work = work_of(args, item);
    mbarrier_wait(&shared.q_empty[ring.stage], ring.parity ^ 1);
    if (item != blockIdx.x) quantize_queries<kQueryWarps>(args, shared, work, ring.stage, threadIdx.x / 32 - 1);
    shared.k_largest_scale[ring.stage] = args.k_largest_scale[Sequence{args, work}.kv_head()];
    mbarrier_arrive(&shared.q_full[ring.stage]);
  }
}
#endif
