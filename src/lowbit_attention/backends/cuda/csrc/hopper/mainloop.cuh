// A consumer warpgroup of attention_wgmma: scores, softmax and P·V of its 64 rows, tile after tile.
#pragma once
#include "common/softmax.cuh"
#include "hopper/block.cuh"
#include "hopper/multiply.cuh"
#include "hopper/rows.cuh"
#include "ptx/barrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/wgmma.cuh"

template <bool kExact>
struct TilePath {  // of `exponentials`: kExact if a tile hides keys, or its factor is too large for the fast path
  static constexpr bool kMasked = kExact, kSums = !SUM_IN_MMA, kPolynomial = ::kPolynomial, kHidesLast = ::kHidesLast;
};

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

  // of the work tile
  float q_scale;             // read anew for each tile if READS_SCALE
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
#if JUMP
  u32 after_jump;    // the tile after the last one that jumped, kNone if none has
#endif
  float rescale[2];  // what O and sums before it are to be multiplied with
  Sums sums;
  bool ready;        // its V and the next tile's K are in shared memory

  static constexpr u32 kNone = 0xFFFFFFFF;

  // ---- barriers and stages

  // What was promoted before the present interval.
  __device__ __forceinline__ Promoted& before() {
#if HALVES_SCORES
    return shared.promoted[thread.group][threadIdx.x % 128];
#else
    return promoted_before;
#endif
  }
  __device__ __forceinline__ float (&seen())[2] {
#if SEEN_IN_SHARED
    return shared.seen[thread.group][thread.warp][thread.quad];  // (four threads write the same)
#else
    return before().seen;
#endif
  }
  __device__ __forceinline__ void wait_for_stage() { mbarrier_wait(&shared.full[ring.stage], ring.parity); }
  __device__ __forceinline__ void release(int stage) {
    if (arrives) mbarrier_arrive(&shared.empty[stage]);
  }
  // Ping-pong: three or four warpgroups issue their MMAs in order, so that their softmaxes do not coincide. (Otherwise the
  // tensor cores share the MMAs of all out, and all warpgroups wait for all of them.)
  static constexpr bool kPingPong = OUTPUT_IN_SHARED;
  static constexpr int kPingPongThreads = 2 * 128;  // the warpgroup that waits, and the one before it, which arrives
  __device__ __forceinline__ void await_ping_pong() const {
    if (kPingPong) bar_sync(kPingPongBarrier + thread.group, kPingPongThreads);
  }
  __device__ __forceinline__ void pass_ping_pong() const {
    if (kPingPong) bar_arrive(kPingPongBarrier + (thread.group + 1) % kConsumers, kPingPongThreads);
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
    if constexpr (READS_SCALE) read_q_scale();
    if constexpr (MAKES_BOUND) make_bound();
    factor = q_scale * shared.k_scale[ring.stage][thread.lane_in_quad];
    factor = factor > largest_factor ? largest_factor : factor;
    if constexpr (HALVES_SCORES) factor = max_nan_f32(factor, kSmallestFactor);  // (0 · −∞ is NaN)
  }
  // Whether some factor of the work tile needs the exact path; the same for the whole warpgroup.
  __device__ __forceinline__ bool needs_exact_path() const {
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

  // ---- promotions: an interval's sums are added to O

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

  // ---- a tile

  // From a tile's scores to its P, while P·V of the tile before ends. kMasked: the exact path.
  template <bool kMasked>
  __device__ __forceinline__ void softmax(const Visible& visible) {
    const bool never = args.items < 0;
    float m[2], other[2];
    largest_logit<kMasked>(scores, factor, visible, m);
    exchange(m, other, 1);
    exchange_again(m, other, 2);
    begins = fresh(tile);
    Change change;
#if JUMP
    bool alone = tile == after_jump;
    rows.update_jumping(change, seen(), before().m, m, other, begins, alone, tile == 0, args);
    if (alone) after_jump = tile + 1;
#else
    rows.update<RESTART>(change, before().seen, m, other, begins, args.slack, args.headroom);
#endif
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
    exponentials<TilePath<kMasked>>(scores, p, rows, before().sum, without_nan(factor), args.log2_p_max);
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
#if JUMP  // (An interval may begin in one warp alone, and an MMA adds to the sums of all warps or of none. Zeros that are
        // no products, the assembler moves about, and lacks registers.)
        rescale[0] = rescale[1] = 0.0f;
        rescale_sums(sums, rescale);
#endif
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

  // ---- the schedules: how P·V of a tile and the next tile's scores begin

  // P·V in two parts, the second of which takes the first's registers, the scores between them.
  template <bool kMore>
  __device__ __forceinline__ void begin_in_two_parts() {
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
  }
  // All scores first, then P·V, side by side.
  template <bool kMore>
  __device__ __forceinline__ void begin_together() {
    if constexpr (kMore) begin_scores();
    begin_pv<0>(adds_to_sums());
  }
  // P·V, the scores of the half that P did not replace beside it; the other half's when P·V has ended.
  template <bool kMore>
  __device__ __forceinline__ void begin_by_halves() {
    begin_pv<0>(adds_to_sums());
    if constexpr (kMore) {
      begin_scores<1>();
      wgmma_wait_group<1>();
      pin_registers(sums);
      pin_registers(p);  // (its place is free)
      begin_scores<0>();
    }
  }
  __device__ __forceinline__ bool adds_to_sums() const {
#if JUMP
    return tile > 0;
#else
    return MAKES_MORE ? !fresh(tile) : !begins;
#endif
  }

  // Begins the next tile's scores and this one's P·V, and awaits the scores. kDrain: P·V, too (HALVES_SCORES always does). (In a
  // loop, no MMA may be under way where the loop closes: the assembler would serialise them all.)
  template <bool kMore, bool kDrain>
  __device__ __forceinline__ void multiply() {
    if (!ready) wait_for_stage();
    if constexpr (kMore) prefetch_bits(tile + 1);
    if constexpr (kTwoParts) {
      begin_in_two_parts<kMore>();
    } else {
      await_ping_pong();
      if constexpr (HALVES_SCORES) begin_by_halves<kMore>();
      else begin_together<kMore>();
      pass_ping_pong();
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

  // What the rows see of a tile.
  __device__ __forceinline__ Visible visible(i32 first_row, i32 tile) const {
#if MASK_BIAS
    return {bias_of(tile)};
#elif MASK_BITS
    const u32* from = bits_of(tile);
    return {{ld_global_nc_u32(from), ld_global_nc_u32(from + 8 * 4)}};
#else
    const i32 key = (first_tile(shared.work[q_ring.stage]) + tile) * kTileKeys + 2 * thread.lane_in_quad;
    const i32 kv_len = kv_len_of(args, shared.work[q_ring.stage]);
#if SEQUENCES
    const i32 causal_offset = shared.work[q_ring.stage].causal_offset;
#else
    const i32& causal_offset = args.causal_offset;  // (in a register the assembler would lack it)
#endif
    return {{Mask::last_key(first_row + thread.row(0), causal_offset, kv_len) - key,
             Mask::last_key(first_row + thread.row(1), causal_offset, kv_len) - key}};
#endif
  }
#if LISTS_TILES
  // The number of the warpgroup's rows' block of a tile.
  __device__ __forceinline__ i64 mask_block(i32 tile) const {
    return shared.tile_block[q_ring.stage][tile % kTileSlots] + thread.group * args.mask.row_step;
  }
  __device__ __forceinline__ const u32* bits_of(i32 tile) const {
    return args.mask.bits + mask_block(tile) * (kMaskRows * 4) + thread.row(0) * 4 + thread.lane_in_quad;
  }
  __device__ __forceinline__ const u16* bias_of(i32 tile) const {
    return args.mask.bias + mask_block(tile) * (kMaskRows * kTileKeys) + bias_of_row(thread.row(0), thread.lane_in_quad);
  }
#endif
  // A tile's bits come to L1 while its scores are under way. (Where there is a register for that.)
  __device__ __forceinline__ void prefetch_bits(i32 tile) const {
#if LISTS_TILES
    if (kLacksRegisters) return;
#endif
#if MASK_BIAS
    constexpr i32 kWarpBiases = 16 * kTileKeys, kLine = kWarpBiases / 32;  // a lane's
    static_assert(kLine * sizeof(u16) <= 128, "of L1");
    const i32 place = thread.warp * kWarpBiases + laneid() * kLine;
    prefetch_global_l1(args.mask.bias + mask_block(tile) * (kMaskRows * kTileKeys) + place);
#elif MASK_BITS
    prefetch_global_l1(bits_of(tile));
    prefetch_global_l1(bits_of(tile) + 8 * 4);
#endif
  }
  // On the fast path scores are hidden only with bits.
  __device__ __forceinline__ Visible visible_on_fast_path(i32 first_row) const {
#if MASK_BITS
    return visible(first_row, tile);
#else
    return {};
#endif
  }

  // ---- a work tile: prologue, main loop, epilogue

  // Waits for the next work tile; whether there is one.
  __device__ __forceinline__ void await_work() { mbarrier_wait(&shared.q_full[q_ring.stage], q_ring.parity); }
  __device__ __forceinline__ bool has_work() {
    await_work();
    return __shfl_sync(0xFFFFFFFF, shared.work[q_ring.stage].end_row, 0) >= 0;  // (so the branch is the warp's)
  }

  __device__ __forceinline__ void work_on() {
    const WorkTile work = shared.work[q_ring.stage];
    const i32 first_row = work.first_row + thread.group * kRows;
    const KeyTiles mine = tiles_of(args, first_row, kRows, work);
    const KeyTiles all = tiles_of(args, work.first_row, kConsumers * kRows, work);
    clear();
    if (mine.count > 0) {
      prologue();
      const u32 last = mine.count - 1, fast = needs_exact_path() ? 0 : mine.full;  // (≤ count)
      if constexpr (HALVES_SCORES) mainloop_by_halves(first_row, fast, last);
      else mainloop(first_row, fast, last);
      multiply<false, true>();
    } else {
      clear_sums();
      if (all.count > 0) pass_stage();
    }
    for (i32 j = mine.count; j < all.count; ++j) {  // stages that only another warpgroup's rows need
      await_ping_pong(), pass_ping_pong();
      pass_stage();
    }
    epilogue();
  }

  __device__ __forceinline__ void clear() {
    if constexpr (!OUTPUT_IN_SHARED) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
    }
    rows.m[0] = rows.m[1] = -kInfinity;
    before().reset();
#if SEEN_IN_SHARED
    seen()[0] = seen()[1] = -kInfinity;
#endif
    tile = 0;
#if JUMP
    after_jump = kNone;
#endif
  }
  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < int(sizeof(Sums) / 4); ++i) sums[i] = 0;
  }

  // The first tile's scores.
  __device__ __forceinline__ void prologue() {
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
    prefetch_bits(0);
    wgmma_wait_group<0>();
    pin_registers(scores);
    release(ring.stage);
    ring.next();
  }

  // Tiles up to `last` but for its P·V: the first `fast` on the fast path, the others on the exact one.
  __device__ __forceinline__ void mainloop(i32 first_row, u32 fast, u32 last) {
    if (!MASK_BIAS && fast > 0) {
      softmax<false>(visible_on_fast_path(first_row));
      while (tile + 1 < fast) {
        multiply<true, false>();
        softmax<false>(visible_on_fast_path(first_row));
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
  }
  // Here P does not go from one loop to the other, which would take registers of its own: the last tile always takes the
  // exact path.
  __device__ __forceinline__ void mainloop_by_halves(i32 first_row, u32 fast, u32 last) {
    while (!MASK_BIAS && tile < fast && tile < last) {
      softmax<false>(visible_on_fast_path(first_row));
      multiply<true, true>();
    }
    while (tile < last) {
      softmax<true>(visible(first_row, tile));
      multiply<true, true>();
    }
    softmax<true>(visible(first_row, last));
  }

  // ---- the epilogue (hopper/epilogue.cuh)

  __device__ __forceinline__ void epilogue();
  __device__ __forceinline__ void finish(const WorkTile& work, const float (&last)[2]);
#if OUTPUT_IN_SHARED
  __device__ __forceinline__ void clear_output();
  __device__ __forceinline__ bool ends_splits(const WorkTile& work, float (&last)[2]);
#endif
};
