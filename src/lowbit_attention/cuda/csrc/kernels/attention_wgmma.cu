// Attention for Hopper: INT8 Q·Kᵀ and FP8 P·V by wgmma, on K and V that kernels/pack.cu has packed.
//
// A thread block is a producer warpgroup and two or three consumer warpgroups of 64 query rows each. The producer's
// first warp copies tiles of K and V to shared memory; its others quantise the rows of Q of the next piece of work. A
// consumer takes the keys 128 at a time, in two halves A and B, so that most of what the tensor cores do for it passes
// while it is busy with exponentials:
//
//   maximum of A and B | exponentials of A | issue P·V(A), scores of the next A | exponentials of B |
//   wait, issue P·V(B), scores of the next B | wait
//
// docs/kernels/hopper.md counts the cycles. Compiled for:
//   HEAD_DIM         64 or 128 (channels are padded to it)
//   SUMS_F16         P·V in FP16 sums (1) or FP32-typed ones (0)
//   PROMOTION_KEYS   after how many keys they are added to the FP32 output: 64 or a multiple of 128
//   PROMOTE_FIRST    promote after the first tile, too, and count from there
//   RESTART          begin each interval with its own maximum (RestartedMax), else the running one
//   SUM_IN_MMA       the row sum is a column of ones beside V, else the FP32 sum of P before rounding
#include "attend/quantize_q.cuh"
#include "attend/schedule.cuh"
#include "attend/softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/wgmma.cuh"
#include "tile/output.cuh"
#include "tile/strided.cuh"
#include "tile/swizzle.cuh"

struct AttentionArgs {
  Strided q;              // [B, Hq, Nq, D]
  void* out;              // [B, Hq, Nq, Dv] in q's type, channels next to each other
  i64 out_batch, out_head, out_token;  // strides in elements
  float* lse;             // [B, Hq, Nq], or null
  const u8* k_tiles;      // [B · Hkv][tiles][128 keys × kDim]
  const float* k_scales;  // [B · Hkv][tiles][4]
  const u8* v_tiles;      // [B · Hkv][tiles][kDim × 128 keys]
  const float* k_mean;    // [B · Hkv][kDim], for lse
  const float* k_largest_scale;  // [B · Hkv], of all tiles
  const float* v_scale;   // [B · Hkv][kDim]
  const float* v_mean;    // [B · Hkv][kDim]
  float sm_scale;         // logits = sm_scale · q · k
  float logits_scale;     // |sm_scale| · log2 e
  float log2_p_max;       // log2 P_r, rounded down
  float p_max;            // P_r
  float slack, headroom;  // of RestartedMax
  i32 q_heads, kv_heads, q_len, kv_len, channels, v_channels;
  i32 causal_offset;      // query i sees key j if j ≤ i + causal_offset; kv_len without causality
  i32 tiles, items;
  i32 dtype;
  Schedule schedule;
};

// ---- tile numbers

constexpr int kDim = HEAD_DIM;
constexpr int kRows = 64;                     // of a warpgroup: wgmma's M
constexpr int kHalf = 64;                     // keys of half a tile
constexpr bool kPromotesHalves = PROMOTION_KEYS == kHalf;
constexpr int kInterval = kPromotesHalves ? 1 : PROMOTION_KEYS / kTileKeys;  // tiles a promotion
// O changes with every tile where each is promoted, so it lies in registers, which leaves room for two warpgroups. Where
// it changes seldom it lies in shared memory, and a third warpgroup fills the time that a warp's latencies leave.
#define OUTPUT_IN_SHARED (SUMS_F16 && PROMOTION_KEYS > 128)
constexpr int kConsumers = OUTPUT_IN_SHARED ? 3 : 2;
constexpr int kStages = kDim == 64 ? 4 : OUTPUT_IN_SHARED ? 2 : 3;  // pairs of tiles of K and V in flight
constexpr int kThreads = 128 * (kConsumers + 1);
// What setmaxnreg leaves of 65536 registers: 56 · 128 + 152 · 384 or 224 · 256.
constexpr int kProducerRegisters = 56;
constexpr int kConsumerRegisters = OUTPUT_IN_SHARED ? 152 : 224;
constexpr int kTileBytes = kTileKeys * kDim;
constexpr int kOnes = SUM_IN_MMA ? 8 : 0;     // more rows of V: ones
constexpr int kQueryWarps = 3;                // of the producer's warpgroup
// Fences between the exponentials gain 1 % with three warpgroups at head dimension 128 and cost 1 to 4 % elsewhere.
constexpr bool kFences = OUTPUT_IN_SHARED && kDim == 128;
constexpr float kLn2 = 0.6931471805599453f;

struct Shared {
  alignas(1024) u8 k[kStages][kTileBytes];
  alignas(1024) u8 v[kStages][kTileBytes + kOnes * kTileKeys];
  alignas(1024) u8 q[2][kConsumers][kRows * kDim];
#if OUTPUT_IN_SHARED
  Vec16 o[kConsumers][kDim / 8][128];  // each thread's own, four by four
#endif
  float k_scale[kStages][4];
  float q_scale[2][kConsumers][4][8];       // of a warp's rows r and r + 8, in base-2 logits
  float mean_logit[2][kConsumers][kRows];   // sm_scale · q · k̄
  float k_largest_scale[2];                 // of the head's tiles
  u64 full[kStages], empty[kStages], q_full[2], q_empty[2];
};

template <int kLength>
struct Ring {  // a place in a ring of stages, and the parity of the barriers' phase there
  int stage = 0;
  u32 parity = 0;
  __device__ void next() {
    if (++stage == kLength) stage = 0, parity ^= 1;
  }
};

// ---- P·V's sums, in the two formats

#define WGMMA_NAME_(n, type) wgmma_m64n##n##k32_##type##_e4m3_rs
#define WGMMA_NAME(n, type) WGMMA_NAME_(n, type)
#if HEAD_DIM == 128 && SUM_IN_MMA
#define COLUMNS 136
#elif HEAD_DIM == 64 && SUM_IN_MMA
#define COLUMNS 72
#else
#define COLUMNS HEAD_DIM
#endif

#if SUMS_F16
using Sums = u32[COLUMNS / 4];  // two FP16 sums a register: row half r % 2, channels 8 · (r / 2) + 2q and + 1
__device__ __forceinline__ void multiply_pv(Sums& sums, const u32 (&p)[4], u64 v, bool accumulate) {
  WGMMA_NAME(COLUMNS, f16)(sums, p, v, accumulate);
}
__device__ __forceinline__ float sum_of(const Sums& sums, int i) {
  const u32 pair = sums[i / 4 * 2 + i / 2 % 2];
  return cvt_f32_f16(u16(i % 2 ? pair >> 16 : pair));
}
__device__ __forceinline__ void rescale_sums(Sums& sums, const float (&factor)[2]) {
  const u32 pair[2] = {cvt_f16x2_f32(factor[0], factor[0]), cvt_f16x2_f32(factor[1], factor[1])};
#pragma unroll
  for (int r = 0; r < COLUMNS / 4; ++r) sums[r] = mul_f16x2(sums[r], pair[r % 2]);
}
#else
using Sums = float[COLUMNS / 2];
__device__ __forceinline__ void multiply_pv(Sums& sums, const u32 (&p)[4], u64 v, bool accumulate) {
  WGMMA_NAME(COLUMNS, f32)(sums, p, v, accumulate);
}
__device__ __forceinline__ float sum_of(const Sums& sums, int i) { return sums[i]; }
__device__ __forceinline__ void rescale_sums(Sums& sums, const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) sums[i] *= factor[i / 2 % 2];
}
#endif

__device__ inline Work work_of(const AttentionArgs& args, i32 item) {
  return work_item(item, args.schedule, kConsumers * kRows);
}

// ---- the producer

// Stage i of a piece of work holds K's tile i and V's tile i − 1: what a consumer needs at the same time.
__device__ void copy_tiles(const AttentionArgs& args, Shared& shared) {
  Ring<kStages> ring;
  for (i32 item = blockIdx.x; item < args.items; item += gridDim.x) {
    const Work work = work_of(args, item);
    const i32 count = key_tiles(work.first_row, kConsumers * kRows, args.q_len, args.causal_offset, args.kv_len).count;
    const i64 first = (i64(work.batch) * args.kv_heads + work.kv_head) * args.tiles;
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

template <Dtype kDtype>
__device__ void quantize_queries(const AttentionArgs& args, Shared& shared) {
  Ring<2> ring;
  for (i32 item = blockIdx.x; item < args.items; item += gridDim.x, ring.next()) {
    const Work work = work_of(args, item);
    const i64 base = i64(work.batch) * args.q.batch + i64(work.head) * args.q.head;
    const float* mean = args.lse == nullptr
                            ? nullptr
                            : args.k_mean + (i64(work.batch) * args.kv_heads + work.kv_head) * kDim;
    mbarrier_wait(&shared.q_empty[ring.stage], ring.parity ^ 1);
    for (int block = threadIdx.x / 32 - 1; block < 4 * kConsumers; block += kQueryWarps) {  // 16 rows of one warp
      const int group = block / 4, warp = block % 4;
      quantize_rows<kDtype, kDim>(
          args.q, base, work.first_row + 16 * block, args.q_len, args.channels, args.sm_scale, args.logits_scale, mean,
          shared.q[ring.stage][group], warp, shared.q_scale[ring.stage][group][warp],
          shared.mean_logit[ring.stage][group] + 16 * warp);
    }
    shared.k_largest_scale[ring.stage] = args.k_largest_scale[i64(work.batch) * args.kv_heads + work.kv_head];
    fence_proxy_async();
    mbarrier_arrive(&shared.q_full[ring.stage]);
  }
}

// ---- a consumer warpgroup

struct Thread {  // where a thread stands in its warpgroup
  int group, warp, quad, q;
  __device__ Thread()
      : group(__shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0)),  // (so that the compiler knows it is the warp's)
        warp(__shfl_sync(0xFFFFFFFF, threadIdx.x / 32 % 4, 0)),
        quad(threadIdx.x % 32 / 4),
        q(threadIdx.x % 4) {}
  __device__ int row(int half) const { return 16 * warp + quad + 8 * half; }
};

struct Consumer {
  const AttentionArgs& args;
  Shared& shared;
  const Thread thread;
  const bool arrives = threadIdx.x % 32 == 0;  // one lane of each warp
  Ring<kStages> ring;
  Ring<2> q_ring;

  // of the piece of work
  i32 scores[2][32];  // of a tile's halves
  float factor;       // from scores to logits
  u32 p[8];           // A fragments of P for the next P·V
  Sums sums[kPromotesHalves ? 2 : 1];
#if !OUTPUT_IN_SHARED
  float o[kDim / 2];
#endif
  Rows rows;
  u32 tile;

  __device__ __forceinline__ void wait_for_stage() { mbarrier_wait(&shared.full[ring.stage], ring.parity); }
  __device__ __forceinline__ void release_stage() {
    if (arrives) mbarrier_arrive(&shared.empty[ring.stage]);
    ring.next();
  }
  // The factor of the tile whose scores are under way.
  __device__ __forceinline__ float next_factor() const {
    const float q_scale = shared.q_scale[q_ring.stage][thread.group][thread.warp][thread.quad];
    const float k_scale = shared.k_scale[ring.stage][thread.q], largest = shared.k_largest_scale[q_ring.stage];
    // a group of zeros has the scale 1, which may be far larger; its scores are 0 whatever the factor (NaN stays)
    return min_nan_f32(q_scale * (k_scale > largest ? largest : k_scale), kLargestFactor);
  }
  // Whether some factor of the piece of work wants care; the same for the whole warpgroup.
  __device__ __forceinline__ bool wants_care() const {
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) largest = fmaxf(largest, shared.q_scale[q_ring.stage][thread.group][i / 8][i % 8]);
    return __any_sync(0xFFFFFFFF, largest * shared.k_largest_scale[q_ring.stage] > kLargestFastFactor);  // (NaN shows either way)
  }

  __device__ __forceinline__ void begin_scores(int half) {
    const u64 q = wgmma_descriptor<kDim>(shared.q[q_ring.stage][thread.group]);
    const u64 k = wgmma_descriptor<kDim>(shared.k[ring.stage]) + half * (kHalf * kDim / 16);
    pin_registers(scores[half]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      wgmma_m64n64k32_s32_s8_ss(scores[half], q + i * kDescriptorStep, k + i * kDescriptorStep, i > 0);
    }
    wgmma_commit_group();
  }

  __device__ __forceinline__ void begin_pv(int half, bool accumulate) {
    const u64 v = wgmma_descriptor<kTileKeys>(shared.v[ring.stage]) + half * (kHalf / 16);
    Sums& to = sums[kPromotesHalves ? half : 0];
    pin_registers(p);
    pin_registers(to);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHalf / 32; ++i) {
      const u32(&four)[4] = reinterpret_cast<const u32(&)[4]>(p[4 * i]);
      multiply_pv(to, four, v + i * kDescriptorStep, accumulate || i > 0);
    }
    wgmma_commit_group();
  }

  __device__ __forceinline__ void pin_sums() {
#pragma unroll
    for (int half = 0; half < (kPromotesHalves ? 2 : 1); ++half) pin_registers(sums[half]);
  }

  // Whether a tile begins an interval: what was summed before is promoted.
  static __device__ __forceinline__ bool fresh(u32 tile) {
    return tile == 0 || tile % u32(kInterval) == (PROMOTE_FIRST ? 1 % kInterval : 0);
  }

  // O · factor + the interval's sums, four channels of the thread's at a time. kFirst: there is no O yet.
  template <bool kFirst, class Use>
  __device__ __forceinline__ void promoted(const Sums& from, const float (&scale)[2], Use use) {
#pragma unroll
    for (int four = 0; four < kDim / 8; ++four) {
      float x[4];
#if OUTPUT_IN_SHARED
      Vec16 old = {};
      if constexpr (!kFirst) old = shared.o[thread.group][four][threadIdx.x % 128];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(old.word[i]);
#else
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = o[4 * four + i];
#endif
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = __fmaf_rn(x[i], scale[i / 2], sum_of(from, 4 * four + i));
      use(four, x);
    }
  }

  template <bool kFirst = false>
  __device__ __forceinline__ void promote(const Sums& from, const float (&scale)[2]) {
    promoted<kFirst>(from, scale, [&](int four, const float (&x)[4]) {
#if OUTPUT_IN_SHARED
      shared.o[thread.group][four][threadIdx.x % 128] = {
          {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])}};
#else
#pragma unroll
      for (int i = 0; i < 4; ++i) o[4 * four + i] = x[i];
#endif
    });
#if SUM_IN_MMA
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.sum[half] = __fmaf_rn(rows.sum[half], scale[half], sum_of(from, kDim / 2 + 2 * half));
    }
#endif
  }

  // One tile whose scores are there; begins and awaits those of the next if there are more. kMasked: it hides keys, or
  // its factor wants care.
  template <bool kMasked, bool kMore>
  __device__ __forceinline__ void advance(const Visible& visible) {
    const bool never = args.items < 0;
    float m[2], other[2];
    largest_logit<kMasked>(scores[0], scores[1], factor, visible, m);
    exchange(m, other, 1);
    exchange_again(m, other, 2);
    const bool interval_begins = fresh(tile);
    Change change;
    rows.update<kMasked, RESTART>(change, m, other, interval_begins, args.slack, args.headroom);
    float rescale[2] = {1.0f, 1.0f};
#if !SUM_IN_MMA
    if (change.moved) rows.rescale<kMasked>(change, rescale);
    rows.sum[0] *= rescale[0], rows.sum[1] *= rescale[1];
#endif
    u32 packed[8];
    exponentials<kMasked, !SUM_IN_MMA, !kMasked && kFences>(scores[0], packed, rows, factor, args.log2_p_max, never);

#if SUM_IN_MMA
    if (change.moved) rows.rescale<kMasked>(change, rescale);  // (here: nothing waits for the vote)
#endif
    if constexpr (kInterval > 1) {
      if (tile > 0 && interval_begins) {
        float scale[2];
        rows.promotion<kMasked>(change, scale);
        if (tile == (PROMOTE_FIRST ? 1 : kInterval)) promote<true>(sums[0], scale);
        else promote(sums[0], scale);
      } else if (change.moved) {
        rescale_sums(sums[0], rescale);
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = packed[i];
    wait_for_stage();
    begin_pv(0, !interval_begins);
    if constexpr (kMore) begin_scores(0);
    pmevent_if(never);  // (else the assembler issues the MMAs in between the exponentials)
    exponentials<kMasked, !SUM_IN_MMA, !kMasked && kFences>(scores[1], packed, rows, factor, args.log2_p_max, never);
    pin_registers(packed);
    pmevent_if(never);  // (else the assembler waits before the exponentials)
    wgmma_wait_group<0>();
    pin_sums();
    if constexpr (kMore) pin_registers(scores[0]);
#pragma unroll
    for (int i = 0; i < 8; ++i) p[i] = packed[i];
    begin_pv(1, !kPromotesHalves);
    if constexpr (kMore) {
      begin_scores(1);
      factor = next_factor();
    }
    if constexpr (kPromotesHalves) promote(sums[0], rescale);
    wgmma_wait_group<0>();
    pin_sums();
    if constexpr (kMore) pin_registers(scores[1]);
    release_stage();
    if constexpr (kPromotesHalves) {
      const float same[2] = {1.0f, 1.0f};
      promote(sums[1], same);
    } else if constexpr (kInterval == 1) {
      promote(sums[0], rescale);
    }
    ++tile;
  }

  __device__ __forceinline__ Visible visible(i32 first_row, i32 tile) const {
    const i32 key = tile * kTileKeys + 2 * thread.q;
    return {{last_key(first_row + thread.row(0), args.causal_offset, args.kv_len) - key,
             last_key(first_row + thread.row(1), args.causal_offset, args.kv_len) - key}};
  }

  // O / l · δ_V + v̄, and lse. Rows that saw no key give 0 and −∞. Where O lies in shared memory, `last` says what it is
  // to be multiplied with before the last interval's sums are added; `first`: there is no O yet.
  template <Dtype kDtype>
  __device__ __forceinline__ void finish(const Work& work, const float (&last)[2], bool first) {
    const i64 channels = (i64(work.batch) * args.kv_heads + work.kv_head) * kDim + 2 * thread.q;
    Vec8 scale[kDim / 8], mean[kDim / 8];  // all loads at once: each alone would wait for memory
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      scale[i] = *reinterpret_cast<const Vec8*>(args.v_scale + channels + 8 * i);
      mean[i] = *reinterpret_cast<const Vec8*>(args.v_mean + channels + 8 * i);
    }
    const i32 token = work.first_row + thread.group * kRows + thread.row(0);
    float inverse[2], seen[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = rows.sum[half];
#if SUM_IN_MMA
      if (kInterval > 1) sum = __fmaf_rn(sum, last[half], sum_of(sums[0], kDim / 2 + 2 * half));
#else
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
      sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
#endif
      seen[half] = rows.m[half] == -kInfinity ? 0.0f : 1.0f;
      inverse[half] = rows.m[half] == -kInfinity ? 0.0f : 1.0f / sum;
      if (args.lse != nullptr && thread.q == 0 && token + 8 * half < args.q_len) {
        const float mean_logit = shared.mean_logit[q_ring.stage][thread.group][thread.row(half)];
        args.lse[(i64(work.batch) * args.q_heads + work.head) * args.q_len + token + 8 * half] =
            rows.m[half] == -kInfinity ? -kInfinity : (rows.m[half] + __log2f(sum / args.p_max)) * kLn2 + mean_logit;
      }
    }
    const i64 at = work.batch * args.out_batch + work.head * args.out_head + token * args.out_token + 2 * thread.q;
    const auto store = [&](int i, const float (&x)[4]) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float y[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float scaled = x[2 * half + c] * inverse[half] * __uint_as_float(scale[i].word[c]);
          y[c] = __fmaf_rn(__uint_as_float(mean[i].word[c]), seen[half], scaled);
          y[c] = max_nan_f32(min_nan_f32(y[c], kLargest<kDtype>), -kLargest<kDtype>);
        }
        if (token + 8 * half < args.q_len && 8 * i < args.v_channels) {
          store_pair<kDtype>(args.out, at + 8 * half * args.out_token + 8 * i, y[0], y[1]);
        }
      }
    };
#if OUTPUT_IN_SHARED
    if (first) promoted<true>(sums[0], last, store);
    else promoted<false>(sums[0], last, store);
#else
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const float x[4] = {o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
      store(i, x);
    }
#endif
  }

  __device__ __forceinline__ void work_on(const Work& work) {
    const i32 first_row = work.first_row + thread.group * kRows;
    const KeyTiles mine = key_tiles(first_row, kRows, args.q_len, args.causal_offset, args.kv_len);
    const KeyTiles all = key_tiles(work.first_row, kConsumers * kRows, args.q_len, args.causal_offset, args.kv_len);
    mbarrier_wait(&shared.q_full[q_ring.stage], q_ring.parity);
#if !OUTPUT_IN_SHARED
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
#endif
    rows.reset();
    tile = 0;
    if (mine.count > 0) {
      wait_for_stage();
      begin_scores(0);
      begin_scores(1);
      factor = next_factor();
      wgmma_wait_group<0>();
      pin_registers(scores[0]);
      pin_registers(scores[1]);
      release_stage();
      const u32 last = mine.count - 1, full = min(u32(mine.full), last);
      const u32 fast = wants_care() ? 0 : full;
      while (tile < fast) advance<false, true>({});
      while (tile < last) advance<true, true>(visible(first_row, tile));
      advance<true, false>(visible(first_row, last));
    } else {
#pragma unroll
      for (int i = 0; i < int(sizeof(Sums) / 4); ++i) sums[0][i] = 0;
      if (all.count > 0) {
        wait_for_stage();
        release_stage();
      }
    }
    for (i32 j = mine.count; j < all.count; ++j) {  // stages that only another warpgroup's rows need
      wait_for_stage();
      release_stage();
    }
    float last_scale[2] = {0.0f, 0.0f};
    if constexpr (kInterval > 1) rows.last_promotion(last_scale);
    const bool first = tile <= (PROMOTE_FIRST ? 1 : kInterval);
    if (args.dtype == kBFloat16) finish<kBFloat16>(work, last_scale, first);
    else if (args.dtype == kFloat16) finish<kFloat16>(work, last_scale, first);
    else finish<kFloat32>(work, last_scale, first);
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
      mbarrier_init(&shared.q_full[s], 32 * kQueryWarps), mbarrier_init(&shared.q_empty[s], 4 * kConsumers);
    }
    fence_mbarrier_init();
  }
#if SUM_IN_MMA
  {  // the rows of ones: copies never touch them
    constexpr u32 kFourOnes = 0x38383838;  // E4M3
    for (int i = threadIdx.x; i < kStages * kOnes * kTileKeys / 4; i += kThreads) {
      const int s = i / (kOnes * kTileKeys / 4), at = i % (kOnes * kTileKeys / 4);
      reinterpret_cast<u32*>(shared.v[s] + kTileBytes)[at] = kFourOnes;
    }
    fence_proxy_async();
  }
#endif
  __syncthreads();
  griddepcontrol_wait();  // K and V are packed
  if (threadIdx.x < 128) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) {
      copy_tiles(args, shared);
    } else if (threadIdx.x >= 32) {
      if (args.dtype == kBFloat16) quantize_queries<kBFloat16>(args, shared);
      else if (args.dtype == kFloat16) quantize_queries<kFloat16>(args, shared);
      else quantize_queries<kFloat32>(args, shared);
    }
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    Consumer consumer{args, shared, Thread()};
    for (i32 item = blockIdx.x; item < args.items; item += gridDim.x) {
      consumer.work_on(work_of(args, item));
    }
  }
}
