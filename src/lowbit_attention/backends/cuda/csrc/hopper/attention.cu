// Attention for Hopper: INT8 Q·Kᵀ and FP8 P·V by wgmma, on K and V that pack/pack.cu has packed.
//
// A thread block is a producer warpgroup and two to four consumer warpgroups of 64 query rows each. The producer's
// first warp copies tiles of K and V to shared memory; its others take the next work tile and quantize its rows of Q. A
// consumer's tensor cores multiply P·V of one tile while it looks for the maximum of the next:
//
//   scores of tile j + 1 and P·V of tile j begin | scores there: maximum | P·V there: exponentials
//
// With four there are registers for half of it (HALVES_SCORES); another warpgroup's exponentials fill the time:
//
//   P·V of tile j and half of the scores begin | P·V there: the other half begins | all there: maximum, exponentials
//
// docs/kernels/hopper.md counts the cycles. Compiled for:
//   HEAD_DIM         64 or 128 (channels are padded to it)
//   INPUT_DTYPE      Q's and the output's, of tile/strided.cuh
//   SUMS_F16         P·V in FP16 sums (1) or FP32-typed ones (0)
//   PROMOTION_KEYS   after how many keys they are added to the FP32 output: 64 or a multiple of 128
//   PROMOTE_FIRST    promote after the first tile, too, and count from there
//   RESTART          begin each interval with its own maximum (RestartedMax), else the running one
//   JUMP             give tiles that jump intervals of their own
//   SUM_IN_MMA       the row sum is a column of ones beside V, else the FP32 sum of P before rounding
//   SEQUENCES        sequences of different lengths, one behind the other (common/sequences.cuh)
//   TILE_MEANS       V lacks its means by tile: promotions put them back
// backends/cuda/configs.py writes the numbers that follow, kDim to kSharedBytes, and says why.
#include "hopper/block.cuh"
#include "hopper/epilogue.cuh"
#include "hopper/mainloop.cuh"
#include "hopper/producer.cuh"
#include "ptx/barrier.cuh"
#include "ptx/wgmma.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, 1) attention_wgmma(const __grid_constant__ AttentionArgs args) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&shared.full[s], 1), mbarrier_init(&shared.empty[s], 4 * kConsumers);
    }
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(&shared.q_full[s], 32 * kQueryWarps + 1), mbarrier_init(&shared.q_empty[s], 4 * kConsumers);
#if TAKES_WORK
      mbarrier_init(&shared.work_full[s], 1);
#endif
    }
#if TAKES_WORK
    mbarrier_init(&shared.next_wanted, 1);
#endif
    fence_mbarrier_init();
  }
#if TILE_MEANS
  clear_tile_means(shared);
#elif SUM_IN_MMA
  write_ones(shared);
#endif
  // As in pack/pack.cu: what wrote Q had ended before packing began. Only lse needs a result of packing.
  if (args.lse != nullptr) griddepcontrol_wait();
#pragma unroll
  for (int i = 0; i < kNudges; ++i) pmevent_if(args.items < 0);
  quantize_first_queries(args, shared);
  __syncthreads();
  griddepcontrol_wait();  // K and V are packed
  if (threadIdx.x < 128) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) {
      copy_tiles(args, shared);
    } else if (threadIdx.x >= 32) {
      quantize_other_queries(args, shared);
    }
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    Consumer consumer{args, shared, Thread()};
    if (consumer.thread.group == kConsumers - 1) consumer.pass_ping_pong();  // the first one's first
#if TAKES_WORK
    while (consumer.has_work()) consumer.work_on();
#else
    for (i32 item = blockIdx.x; item < items_of(args); item += gridDim.x) {
      consumer.await_work();
      consumer.work_on();
    }
#endif
    await_rows_sent();
  }
}
