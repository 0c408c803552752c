// Attention by mma.sync, for Ampere, Ada, Blackwell and (to be tested) Hopper: INT8 or INT4 Q·Kᵀ, FP8 or FP16 P·V, on K
// and V that pack/pack.cu has packed.
//
// A warp has 32 query rows; a thread block 128 (or 256, in two groups) and two stages of key tiles in shared memory. A
// tile is 64 keys: scores of all of them, the softmax, then P·V sixteen channels at a time, each sum added to O as soon
// as it is there, so that sums need few registers.
//
// docs/kernels/mma.md counts the instructions. Compiled for:
//   HEAD_DIM     64 or 128 (channels are padded to it)
//   QK_LANES     bits of a lane of Q and K: 8, or 4 (the INT4 MMA)
//   V_HALF       P and V in FP16 (1) or E4M3 (0)
//   SUMS_F16     P·V in FP16 sums (1) or FP32-typed ones (0)
//   PROMOTE      add each tile's sums to an FP32 output (1), or let the MMA sum everything (0)
//   SUM_IN_MMA   the row sum is taken over the rounded P by an MMA with ones (1), or over P before rounding (0)
//   SMOOTH_Q     Q is smoothed, and its tile mean's logits come in `delta`
//   ROTATE       Q is rotated (K was, when it was packed)
//   SEQUENCES    sequences of different lengths, one behind the other (common/sequences.cuh)
// backends/cuda/configs.py writes the numbers that follow, kDim to kSharedBytes, and says why.
#include "mma/block.cuh"
#include "mma/loader.cuh"
#include "mma/mainloop.cuh"
#include "mma/quantize_q.cuh"
#include "ptx/barrier.cuh"

// Returns whether some factor, or ΔS in a score's units, needs the exact path; the same for the whole warp.
template <Dtype kDtype>
__device__ __forceinline__ bool quantize_queries(const MmaArgs& args, Shared& shared, Warp& me, const Work& work) {
  const i64 base = q_base(args, work);
  const i64 kv_head = i64(work.batch) * args.kv_heads + work.kv_head;
  const i32 first_row = work.first_row + me.warp * kWarpRows;
  const QueryOptions options = {rows_of(args, work), args.channels, args.q_max, args.q_granularity, args.sm_scale, args.logits_scale};
  const float* mean = nullptr;
#if SMOOTH_Q
  const i64 head = i64(work.batch) * args.q_heads + work.head;
  const i32 query_tiles = (args.q_len + kScaleRows - 1) / kScaleRows;
  mean = args.q_mean + (head * query_tiles + min(first_row / kScaleRows, query_tiles - 1)) * kDim;
#endif
  float* mean_logit = args.lse == nullptr ? nullptr : args.lse + first_lse(args, work) + first_row;
  float unit;
  u32 spoilt;
  me.q_scale = quantize_32_rows<kDtype, kDim, QK_LANES, SMOOTH_Q, ROTATE>(
      args.q, base, first_row, options, RowsSeen(args, work), mean, args.k_mean + kv_head * kDim, mean_logit, shared.q[me.warp],
      shared.warp_max[me.warp / 4], me.warp / 4, unit, spoilt);
  shared.spoilt[threadIdx.x] = u8(spoilt);
  // Rows of zeros have no scores, so any scale will do: 0 lets the base stay exact, and below ΔS wants a small unit.
  const bool zeros = unit == 0.0f;
  if (zeros) me.q_scale = 0.0f;
  bool exact = me.q_scale * args.k_largest_scale[kv_head] > args.largest_fast_factor;
#if SMOOTH_Q
  // |ΔS| / (δ_Q δ_K) ≤ |q̄| |k| / (δ_Q δ_K), and |k| ≤ √d · q_max · δ_K, rotated or not
  float square = 0.0f;
  for (int i = me.lane_in_quad; i < kDim; i += 4) square += mean[i] * mean[i];
  square += __shfl_xor_sync(0xFFFFFFFF, square, 1);
  square += __shfl_xor_sync(0xFFFFFFFF, square, 2);
  const float most = sqrtf(square * kDim) * float(args.q_max);
  exact |= !(most * unit < kMostUnits);
  if (zeros) me.q_scale = most * (2.0f / kMostUnits) * args.logits_scale;
#endif
  return __any_sync(0xFFFFFFFF, exact);
}

extern "C" __global__ void __launch_bounds__(kThreads, kBlocks) attention_mma(const __grid_constant__ MmaArgs args) {
  extern __shared__ __align__(128) u8 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  griddepcontrol_wait();  // K and V are packed
  const i32 item = args.first_item + i32(blockIdx.x);
  if (!is_item(args, item)) return;
  const Work work = work_of(args, item);
  const KeyTiles tiles = tiles_of(args, work, work.first_row, kRows);
  Loader loader(args, shared, work);
  float k_scale = tiles.count > 0 ? loader.next(0) : 0.0f;
  cp_async_commit_group();

  Warp me(args, shared);
  bool exact;
  if (args.dtype == kBFloat16) exact = quantize_queries<kBFloat16>(args, shared, me, work);
  else if (args.dtype == kFloat16) exact = quantize_queries<kFloat16>(args, shared, me, work);
  else exact = quantize_queries<kFloat32>(args, shared, me, work);

  const auto await = [&] {  // everybody is done with the tile before, and the next one is there
    cp_async_wait_group<0>();
    __syncthreads();
  };
  const auto other_stage = [&] { return u32(sizeof(Stage)) - me.stage; };
  const auto load_next = [&] {
    const float before = k_scale;
    k_scale = loader.next(other_stage());
    cp_async_commit_group();
    return before;
  };
  // The last tile of all is left to the other loop, so that here there always is a next one to be loaded. Both loops are
  // the same for all warps, which spares the compiler's care for those that go their own way.
  const i32 fast = __syncthreads_or(exact) ? 0 : max(min(tiles.full, tiles.count - 1), 0);
  for (i32 left = fast; left > 0; --left) {
    await();
    me.advance<false>(load_next(), {}, 0);
    me.stage = other_stage();
  }
  // the work is found again: the loop above has no registers to keep it
  const Work again = work_of(args, pinned(item));
  const KeyTiles all = tiles_of(args, again, again.first_row, kRows);
  const i32 mine = tiles_of(args, again, again.first_row + me.warp * kWarpRows, kWarpRows).count;
  for (i32 tile = fast; tile < all.count; ++tile) {
    await();
    const float scale = tile + 1 < all.count ? load_next() : k_scale;
    if (tile < mine) me.advance<true>(scale, again, tile);
    me.stage = other_stage();
  }
  const Work done = work_of(args, pinned(item));
  if (args.dtype == kBFloat16) me.finish<kBFloat16>(shared, done);
  else if (args.dtype == kFloat16) me.finish<kFloat16>(shared, done);
  else me.finish<kFloat32>(shared, done);
}
