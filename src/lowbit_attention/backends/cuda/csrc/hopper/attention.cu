// Attention for Hopper: INT8 Q·Kᵀ and FP8 P·V by wgmma, on K and V that pack/pack.cu has packed.
//
// A thread block is a producer warpgroup and two to four consumer warpgroups of 64 query rows each. The producer's
// first warp copies tiles of K and V to shared memory; its others take the next piece of work and quantise its rows of Q. A
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
//   SUM_IN_MMA       the row sum is a column of ones beside V, else the FP32 sum of P before rounding
//   TILE_MEANS       V lacks its means by tile: promotions put them back (not defined: it has them)
#include "common/epilogue.cuh"
#include "common/softmax.cuh"
#include "hopper/block.cuh"
#include "hopper/multiply.cuh"
#include "hopper/producer.cuh"
#include "hopper/rows.cuh"
#include "hopper/splits.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"

// ---- a consumer warpgroup

struct Consumer {
  const AttentionArgs& args;
  Shared& shared;
  const Thread thread;
  const bool arrives = threadIdx.x % 32 == 0;  // one lane of each warp
  Ring<kStages> ring;
  Ring<2> q_ring;

  // the first stages' tiles, as descriptors count addresses
  const u32 q_at = shared_address(shared.q[0][thread.group]) / 16;
  const u32 k_at = shared_address(shared.k[0]) / 16, v_at = shared_address(shared.v[0]) / 16;

  // of the piece of work
  float q_scale;             // read anew for each tile if HALVES_SCORES
  Promoted promoted_before;  // in shared memory if HALVES_SCORES
  float largest_factor;      // made anew for each tile if MAKES_BOUND
  Rows rows;
  float o[OUTPUT_IN_SHARED ? 1 : kDim / 2];

  // of the tile
  u32 tile;
  i32 scores[64];
  float factor;      // from scores to logits
  u32 p[16];         // A fragments of P
  bool begins;       // an interval
  float rescale[2];  // what O and sums before it are to be multiplied with
  Sums sums;
  bool ready;        // its V and the next tile's K are in shared memory

  // What was promoted before the present interval.
  __device__ __forceinline__ Promoted& before() {
#if HALVES_SCORES
    return shared.promoted[thread.group][threadIdx.x % 128];
#else
    return promoted_before;
#endif
  }
  __device__ __forceinline__ void wait_for_stage() { mbarrier_wait(&shared.full[ring.stage], ring.parity); }
  __device__ __forceinline__ void release(int stage) {
    if (arrives) mbarrier_arrive(&shared.empty[stage]);
  }
  // Three or four warpgroups begin their MMAs in turns: whose come first end first, so that the warpgroups stay apart. (The
  // tensor cores would share them out, and all would wait for all of them.)
  static constexpr bool kTakesTurns = OUTPUT_IN_SHARED;
  static constexpr int kTurnThreads = 2 * 128;  // the warpgroup whose turn it is, and that before it
  __device__ __forceinline__ void await_turn() const {
    if (kTakesTurns) bar_sync(1 + thread.group, kTurnThreads);
  }
  __device__ __forceinline__ void pass_turn() const {
    if (kTakesTurns) bar_arrive(1 + (thread.group + 1) % kConsumers, kTurnThreads);
  }
  __device__ __forceinline__ void pass_stage() {
    wait_for_stage();
    release(ring.stage);
    ring.next();
  }
  __device__ __forceinline__ void read_q_scale() {
    q_scale = shared.q_scale[q_ring.stage][thread.group][thread.warp][thread.quad];
  }
  __device__ __forceinline__ void make_bound() {
    largest_factor = fminf(q_scale * shared.k_largest_scale[q_ring.stage], kLargestFactor);
  }
  // The factor of the tile whose scores are under way. A group of zeros in K has the scale 1, which may be far larger
  // than any other; its scores are 0 whatever the factor. (NaN stays.)
  __device__ __forceinline__ void set_factor() {
    if constexpr (HALVES_SCORES) read_q_scale();
    if constexpr (MAKES_BOUND) make_bound();
    factor = q_scale * shared.k_scale[ring.stage][thread.q];
    factor = factor > largest_factor ? largest_factor : factor;
    if constexpr (HALVES_SCORES) factor = max_nan_f32(factor, kSmallestFactor);
  }
  // Whether some factor of the piece of work wants care; the same for the whole warpgroup.
  __device__ __forceinline__ bool wants_care() const {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) largest = fmaxf(largest, shared.q_scale[q_ring.stage][thread.group][i / 8][i % 8]);
    return __any_sync(0xFFFFFFFF, largest * shared.k_largest_scale[q_ring.stage] > kLargestFastFactor);  // (NaN shows either way)
  }

  // The scores of the stage's K: of all its keys, or of one half of them.
  template <int kHalf = -1>
  __device__ __forceinline__ void begin_scores() {
    const u64 q = wgmma_descriptor<kDim>(q_at + q_ring.stage * u32(sizeof(shared.q[0]) / 16));
    const u32 k_first = k_at + ring.stage * u32(sizeof(shared.k[0]) / 16) + (kHalf == 1) * (kTileBytes / 2 / 16);
    const u64 k = wgmma_descriptor<kDim>(k_first);
    if constexpr (kHalf < 0) {
      begin_qk(scores, q, k);
    } else {
      begin_qk(reinterpret_cast<i32(&)[32]>(scores[32 * kHalf]), q, k);
    }
  }

  template <int kPart>
  __device__ __forceinline__ void begin_pv(bool accumulate) {
    constexpr u32 kHalf = kSplitsChannels && kPart == 1 ? kDim / 2 * kTileKeys / 16 : 0;
    const u64 v = wgmma_descriptor<kTileKeys>(v_at + ring.stage * u32(sizeof(shared.v[0]) / 16) + kHalf);
    ::begin_pv<kPart>(sums, p, v, accumulate);
  }

  // Whether a tile begins an interval: what was summed before is promoted.
  static __device__ __forceinline__ bool fresh(u32 tile) {
    return tile == 0 || tile % u32(kInterval) == (PROMOTE_FIRST ? 1 % kInterval : 0);
  }

#if TILE_MEANS
  // Where ldmatrix finds the means by tile, a lane's row of the matrix [column of ones][8 channels]: the means of the
  // latest tile that counted in that column.
  __device__ __forceinline__ u32 means_by_column() const {
    const u32 last = tile - 1, lane = laneid(), of_column = last - ((last - lane) & (kOnes - 1));
    return shared_address(&shared.tile_means[q_ring.stage][of_column % kMeanSlots]);
  }
#endif

  // O · factor + the interval's sums, four channels of the thread's at a time. kFirst: there is no O yet.
  template <bool kFirst, int kPart, class Use>
  __device__ __forceinline__ void promoted(const Sums& from, const float (&scale)[2], Use use) {
    constexpr int kFours = kDim / 8 / (kSplitsChannels ? 2 : 1), kBegin = kSplitsChannels ? kPart * kFours : 0;
#if TILE_MEANS
    const u32 means_at = means_by_column();
#endif
#pragma unroll
    for (int four = kBegin; four < kBegin + kFours; ++four) {
      float x[4];
#if OUTPUT_IN_SHARED
      Vec16 old = {};
      if constexpr (!kFirst) old = shared.o[thread.group][thread.warp][four][threadIdx.x % 32];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(old.word[i]);
#else
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = o[4 * four + i];
#endif
#if TILE_MEANS
      // The last eight columns, the tiles' row sums, lie in registers as an MMA's A does. (One matrix at a time, into the
      // sums: four would take registers that are not there.)
      float whole[4] = {sum_of(from, 4 * four), sum_of(from, 4 * four + 1), sum_of(from, 4 * four + 2),
                        sum_of(from, 4 * four + 3)};
      mma_m16n8k8_f32_f16(whole, from[kColumns / 4 - 2], from[kColumns / 4 - 1], ldmatrix_m8n8_x1_trans(means_at + four * 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __fmaf_rn(x[i], scale[i / 2], whole[i]);
#else
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __fmaf_rn(x[i], scale[i / 2], sum_of(from, 4 * (four - kBegin) + i));
#endif
      use(four, x);
    }
  }

  template <bool kFirst, int kPart>
  __device__ __forceinline__ void promote(const Sums& from, const float (&scale)[2]) {
    promoted<kFirst, kPart>(from, scale, [&](int four, const float (&x)[4]) {
#if OUTPUT_IN_SHARED
      shared.o[thread.group][thread.warp][four][threadIdx.x % 32] = {
          {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])}};
#else
#pragma unroll
      for (int i = 0; i < 4; ++i) o[4 * four + i] = x[i];
#endif
    });
#if SUM_IN_MMA
    if constexpr (!kSplitsChannels || kPart == 1) {
#pragma unroll
      for (int half = 0; half < 2; ++half) before().sum[half] = __fmaf_rn(before().sum[half], scale[half], row_sum(from, half));
    }
#endif
  }

  // From a tile's scores to its P, while P·V of the tile before ends. kMasked: it hides keys, or its factor wants care.
  template <bool kMasked>
  __device__ __forceinline__ void softmax(const Visible& visible) {
    const bool never = args.items < 0;
    float m[2], other[2];
    largest_logit<kMasked>(scores, factor, visible, m);
    exchange(m, other, 1);
    exchange_again(m, other, 2);
    begins = fresh(tile);
    Change change;
    rows.update<RESTART>(change, before().seen, m, other, begins, args.slack, args.headroom);
    if constexpr (!HALVES_SCORES) {
      pmevent_if(never);  // (else the assembler waits before the exchange)
      wgmma_wait_group<0>();
      pin_registers(sums);
    }
    if (tile > 0) {
      release(ring.stage == 0 ? kStages - 1 : ring.stage - 1);
      pmevent_if(never);  // (else the assembler does it after the exponentials)
      if constexpr (kInterval == 1) promote_last();
    }
    rescale[0] = rescale[1] = 1.0f;
    if constexpr (kInterval == 1 && RESTART) {
      rows.rescale<kMasked>(change, rescale);  // (every tile begins an interval, whose maximum may be lower, too)
    } else if constexpr (kInterval == 1 || !SUM_IN_MMA) {
      if (change.moved) rows.rescale<kMasked>(change, rescale);
    }
    if constexpr (!SUM_IN_MMA) before().sum[0] *= rescale[0], before().sum[1] *= rescale[1];
    ready = !MAKES_MORE && mbarrier_test_wait_parity(&shared.full[ring.stage], ring.parity);  // (the answer takes 90 clocks)
    exponentials<kMasked, !SUM_IN_MMA, kPolynomial, kHidesLast>(scores, p, rows, before().sum, factor, args.log2_p_max);
    if constexpr (kInterval > 1) {
      if (tile > 0 && begins) {
        float scale[2];
        before().promote<kMasked>(change.old_m, scale);
        if (tile == (PROMOTE_FIRST ? 1 : kInterval)) {
          await_rows_sent();
          promote<true, 0>(sums, scale);
        } else {
          promote<false, 0>(sums, scale);
        }
      } else if (change.moved) {
        rows.rescale<kMasked>(change, rescale);  // (here: nothing waits for the vote)
        rescale_sums(sums, rescale);
      }
    }
  }

  // Where every tile is promoted: adds the last tile's sums, now there, to O.
  __device__ __forceinline__ void promote_last() {
    if constexpr (kPromotesHalves) rescale[0] = rescale[1] = 1.0f;  // (applied with the first half)
    promote<false, kTwoParts ? 1 : 0>(sums, rescale);
  }

  // Begins the next tile's scores and this one's P·V, and awaits the scores. kDrain: P·V, too (HALVES_SCORES always does). (In a
  // loop, no MMA may be under way where the loop closes: the assembler would serialise them all.)
  template <bool kMore, bool kDrain>
  __device__ __forceinline__ void multiply() {
    if (!ready) wait_for_stage();
    if constexpr (kTwoParts) {
      begin_pv<0>(false);
      if constexpr (kMore) {
        begin_scores();
        wgmma_wait_group<1>();
      } else {
        wgmma_wait_group<0>();
      }
      pin_registers(sums);
      promote<false, 0>(sums, rescale);
      begin_pv<1>(false);
    } else {
      await_turn();
      if constexpr (kMore && !HALVES_SCORES) begin_scores();
      begin_pv<0>(MAKES_MORE ? !fresh(tile) : !begins);
      if constexpr (kMore && HALVES_SCORES) {
        begin_scores<1>();
        wgmma_wait_group<1>();
        pin_registers(sums);
        pin_registers(p);  // (its place is free)
        begin_scores<0>();
      }
      pass_turn();
    }
    if constexpr (kMore && HALVES_SCORES) {
      set_factor();
      wgmma_wait_group<0>();
    } else if constexpr (kMore && !kDrain) {
      wgmma_wait_group<1>();
    } else {
      wgmma_wait_group<0>();
      pin_registers(sums);
    }
    if constexpr (kMore) {
      pin_registers(scores);
      if constexpr (!HALVES_SCORES) set_factor();
      ring.next();
    } else {
      if constexpr (kInterval == 1) promote_last();
      release(ring.stage);
      ring.next();
    }
    ++tile;
  }

  __device__ __forceinline__ Visible visible(i32 first_row, i32 tile) const {
    const i32 key = (first_tile(shared.piece[q_ring.stage]) + tile) * kTileKeys + 2 * thread.q;
    return {{last_key(first_row + thread.row(0), args.causal_offset, args.kv_len) - key,
             last_key(first_row + thread.row(1), args.causal_offset, args.kv_len) - key}};
  }

  // O / l · δ_V + v̄, and lse. Rows that saw no key give 0 and −∞. Where O lies in shared memory, `last` says what it is
  // to be multiplied with before the last interval's sums are added.
  __device__ __forceinline__ void finish(const Piece& work, const float (&last)[2]) {
    const i32 token = work.first_row + thread.group * kRows + thread.row(0);
    float inverse[2], seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = before().sum[half];
#if SUM_IN_MMA
      if (kInterval > 1) sum = __fmaf_rn(sum, last[half], row_sum(sums, half));
#endif
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
      seen[half] = rows.m[half] == -kInfinity ? 0.0f : 1.0f;
      inverse[half] = rows.m[half] == -kInfinity ? 0.0f : 1.0f / sum;
      if (args.lse != nullptr && thread.q == 0 && token + 8 * half < work.end_row) {
        const float mean_logit = shared.mean_logit[q_ring.stage][thread.group][thread.row(half)];
        args.lse[(i64(work.batch) * args.q_heads + work.head) * args.q_len + token + 8 * half] =
            rows.m[half] == -kInfinity ? -kInfinity : (rows.m[half] + __log2f(sum / args.p_max)) * kLn2 + mean_logit;
      }
    }
#if ROWS_THROUGH_SHARED
    u32 y[kDim / 8][2];
#else
    const i64 at = work.batch * args.out_batch + work.head * args.out_head + token * args.out_token + 2 * thread.q;
    const i32 channels[2] = {token < work.end_row ? args.v_channels : 0, token + 8 < work.end_row ? args.v_channels : 0};
#endif
    const auto keep = [&](int i, const float (&x)[4]) {
      if (i % 4 == 0) pmevent_if(args.items < 0);  // (else the assembler loads more at once than registers are left)
      const Vec8 scale = *reinterpret_cast<const Vec8*>(&shared.v_scale[q_ring.stage][8 * i + 2 * thread.q]);
      const Vec8 mean = *reinterpret_cast<const Vec8*>(&shared.v_mean[q_ring.stage][8 * i + 2 * thread.q]);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float z[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float scaled = x[2 * half + c] * inverse[half] * __uint_as_float(scale.word[c]);
          z[c] = __fmaf_rn(__uint_as_float(mean.word[c]), seen[half], scaled);
        }
#if ROWS_THROUGH_SHARED
        y[i][half] = saturated_pair<kInput>(z[0], z[1]);
#else
#pragma unroll
        for (int c = 0; c < 2; ++c) z[c] = max_nan_f32(min_nan_f32(z[c], kLargest<kInput>), -kLargest<kInput>);
        if (8 * i < channels[half]) store_pair<kInput>(args.out, at + 8 * half * args.out_token + 8 * i, z[0], z[1]);
#endif
      }
    };
    if constexpr (OUTPUT_IN_SHARED) {
      promoted<false, 0>(sums, last, keep);
    } else {
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        const float x[4] = {o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
        keep(i, x);
      }
    }
#if ROWS_THROUGH_SHARED
    send_rows(args, work, shared.o[thread.group][thread.warp], token - thread.quad, y);
#endif
  }

#if OUTPUT_IN_SHARED
  // Where nothing was promoted, so that the last sums can be.
  __device__ __forceinline__ void clear_output() {
    await_rows_sent();
#pragma unroll 1
    for (int four = 0; four < kDim / 8; ++four) shared.o[thread.group][thread.warp][four][threadIdx.x % 32] = {};
  }
#endif

#if SPLITS_KEYS
  // Whether all splits of the keys have been summed up; if so, O and the row sum are those of all.
  __device__ __forceinline__ bool ends_splits(const Piece& work, float (&last)[2]) {
    promote<false, 0>(sums, last);
    if (!last_of_splits(args, work, thread, shared.o[thread.group][thread.warp], rows, before())) return false;
    last[0] = last[1] = 1.0f;
#pragma unroll
    for (int i = 0; i < int(sizeof(Sums) / 4); ++i) sums[i] = 0;
    return true;
  }
#endif

  __device__ __forceinline__ void await_piece() { mbarrier_wait(&shared.q_full[q_ring.stage], q_ring.parity); }
  __device__ __forceinline__ bool has_work() {
    await_piece();
    return __shfl_sync(0xFFFFFFFF, shared.piece[q_ring.stage].end_row, 0) >= 0;  // (so the branch is the warp's)
  }

  __device__ __forceinline__ void work_on() {
    const Piece work = shared.piece[q_ring.stage];
    const i32 first_row = work.first_row + thread.group * kRows;
    const KeyTiles mine = tiles_of(args, first_row, kRows, work);
    const KeyTiles all = tiles_of(args, work.first_row, kConsumers * kRows, work);
    if constexpr (!OUTPUT_IN_SHARED) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
    }
    rows.m[0] = rows.m[1] = -kInfinity;
    before().reset();
    tile = 0;
    if (mine.count > 0) {
      wait_for_stage();
      if constexpr (HALVES_SCORES) {
        begin_scores<0>();
        begin_scores<1>();
      } else {
        begin_scores();
        read_q_scale();
        if constexpr (!MAKES_BOUND) make_bound();
      }
      set_factor();
      wgmma_wait_group<0>();
      pin_registers(scores);
      release(ring.stage);
      ring.next();
      const u32 last = mine.count - 1, fast = wants_care() ? 0 : mine.full;  // (≤ count)
#if HALVES_SCORES  // (P does not go from one loop to another, which would take registers of its own; so the last tile is masked)
      while (tile < fast && tile < last) {
        softmax<false>({});
        multiply<true, true>();
      }
      while (tile < last) {
        softmax<true>(visible(first_row, tile));
        multiply<true, true>();
      }
      softmax<true>(visible(first_row, last));
#else
      if (fast > 0) {
        softmax<false>({});
        while (tile + 1 < fast) {
          multiply<true, false>();
          softmax<false>({});
        }
        if (tile < last) multiply<true, true>();
      }
      if (fast <= last) {
        while (tile < last) {
          softmax<true>(visible(first_row, tile));
          multiply<true, true>();
        }
        softmax<true>(visible(first_row, last));
      }
#endif
      multiply<false, true>();
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(Sums) / 4); ++i) sums[i] = 0;
      if (all.count > 0) pass_stage();
    }
    for (i32 j = mine.count; j < all.count; ++j) {  // stages that only another warpgroup's rows need
      await_turn(), pass_turn();
      pass_stage();
    }
    float last_scale[2] = {0.0f, 0.0f};
    if constexpr (kInterval > 1) before().promote<true>(rows.m, last_scale);
    const Piece done = shared.piece[q_ring.stage];  // (read again, instead of keeping it all the while)
    if (done.first_row + thread.group * kRows < done.end_row) {
#if OUTPUT_IN_SHARED
      if (tile <= (PROMOTE_FIRST ? 1 : kInterval)) clear_output();
      if (done.split < 0 || ends_splits(done, last_scale)) finish(done, last_scale);
#else
      finish(done, last_scale);
#endif
    }
    __syncwarp();
    if (arrives) mbarrier_arrive(&shared.q_empty[q_ring.stage]);
    q_ring.next();
  }
};

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
      mbarrier_init(&shared.piece_full[s], 1);
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
    if (consumer.thread.group == kConsumers - 1) consumer.pass_turn();  // the first one's first
#if TAKES_WORK
    while (consumer.has_work()) consumer.work_on();
#else
    for (i32 item = blockIdx.x; item < args.items; item += gridDim.x) {
      consumer.await_piece();
      consumer.work_on();
    }
#endif
    await_rows_sent();
  }
}
