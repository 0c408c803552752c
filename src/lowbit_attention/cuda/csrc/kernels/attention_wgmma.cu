// Attention for Hopper: INT8 Q·Kᵀ and FP8 P·V by wgmma, on K and V that kernels/pack.cu has packed.
//
// A thread block is one producer warp, which copies tiles of K and V to shared memory, and kConsumers warpgroups of 64
// query rows each, which quantise their rows of Q, then for every tile: scores, softmax, P·V, promotion to FP32. While
// one warpgroup is in its softmax, the other keeps the tensor cores busy; the scores of the next tile are under way
// while P·V's sums are promoted.
//
// Compiled for: HEAD_DIM 64 or 128 (channels are padded to it); PROMOTION_KEYS 128 (FP32-typed sums over a tile) or 64
// (FP16 sums over 64 keys), with SUMS_F16 0 or 1.
#include "attend/scale.cuh"
#include "attend/schedule.cuh"
#include "attend/softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/wgmma.cuh"
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
  const float* v_scale;   // [B · Hkv][kDim]
  const float* v_mean;    // [B · Hkv][kDim]
  float sm_scale;         // logits = sm_scale · q · k
  float logits_scale;     // |sm_scale| · log2 e
  float log2_p_max;       // log2 P_r, rounded down
  float p_max;            // P_r
  i32 q_heads, kv_heads, q_len, kv_len, channels, v_channels;
  i32 causal_offset;      // query i sees key j if j ≤ i + causal_offset; kv_len without causality
  i32 tiles, q_blocks, items;
  i32 dtype, padding;
};

// ---- tile numbers

constexpr int kDim = HEAD_DIM;
constexpr int kRows = 64;                      // of a warpgroup: wgmma's M
constexpr int kConsumers = 2;                  // two warpgroups' O, S and P·V sums fill the registers
constexpr int kStages = kDim == 128 ? 3 : 4;   // tiles of K and of V in flight
constexpr int kThreads = 128 * (kConsumers + 1);
constexpr int kProducerRegisters = 24;         // what setmaxnreg leaves: 24 · 128 + 240 · 256 ≤ 65536
constexpr int kConsumerRegisters = 240;
constexpr int kParts = kTileKeys / PROMOTION_KEYS;  // promotions a tile
constexpr int kSteps = PROMOTION_KEYS / 32;         // wgmmas a promotion
constexpr int kTileBytes = kTileKeys * kDim;
constexpr float kLn2 = 0.6931471805599453f;

struct Shared {
  alignas(1024) u8 k[kStages][kTileBytes];
  alignas(1024) u8 v[kStages][kTileBytes];
  alignas(1024) u8 q[kConsumers][kRows * kDim];
  float k_scale[kStages][4];
  float mean_logit[kConsumers][kRows];  // sm_scale · q · k̄
  u64 k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};

struct Ring {  // a place in a ring of stages, and the parity of the barriers' phase there
  int stage = 0;
  u32 parity = 0;
  __device__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// ---- P·V's sums, in the two formats

#if SUMS_F16
using Sums = u32[kDim / 4];  // two FP16 sums a register: row half r % 2, channels 8 · (r / 2) + 2q and + 1
__device__ __forceinline__ void multiply_pv(Sums& sums, const u32 (&p)[4], u64 v, bool accumulate) {
#if HEAD_DIM == 128
  wgmma_m64n128k32_f16_e4m3_rs(sums, p, v, accumulate);
#else
  wgmma_m64n64k32_f16_e4m3_rs(sums, p, v, accumulate);
#endif
}
__device__ __forceinline__ float sum_of(const Sums& sums, int i) {
  const u32 pair = sums[i / 4 * 2 + i / 2 % 2];
  return cvt_f32_f16(u16(i % 2 ? pair >> 16 : pair));
}
#else
using Sums = float[kDim / 2];
__device__ __forceinline__ void multiply_pv(Sums& sums, const u32 (&p)[4], u64 v, bool accumulate) {
#if HEAD_DIM == 128
  wgmma_m64n128k32_f32_e4m3_rs(sums, p, v, accumulate);
#else
  wgmma_m64n64k32_f32_e4m3_rs(sums, p, v, accumulate);
#endif
}
__device__ __forceinline__ float sum_of(const Sums& sums, int i) { return sums[i]; }
#endif

// ---- the producer

__device__ void produce(const AttentionArgs& args, Shared& shared) {
  Ring ring;
  for (i32 item = blockIdx.x; item < args.items; item += gridDim.x) {
    const Work work = work_item(item, args.q_blocks, kConsumers * kRows, args.q_heads, args.kv_heads);
    const i32 count = key_tiles(work.first_row, kConsumers * kRows, args.q_len, args.causal_offset, args.kv_len).count;
    const i64 first = (i64(work.batch) * args.kv_heads + work.kv_head) * args.tiles;
    for (i32 tile = 0; tile < count; ++tile, ring.next()) {
      const int s = ring.stage;
      mbarrier_wait(&shared.k_empty[s], ring.parity ^ 1);
      mbarrier_arrive_expect_tx(&shared.k_full[s], kTileBytes + sizeof(shared.k_scale[s]));
      cp_async_bulk_shared_global(shared.k[s], args.k_tiles + (first + tile) * kTileBytes, kTileBytes, &shared.k_full[s]);
      cp_async_bulk_shared_global(shared.k_scale[s], args.k_scales + (first + tile) * 4, sizeof(shared.k_scale[s]),
                                  &shared.k_full[s]);
      mbarrier_wait(&shared.v_empty[s], ring.parity ^ 1);
      mbarrier_arrive_expect_tx(&shared.v_full[s], kTileBytes);
      cp_async_bulk_shared_global(shared.v[s], args.v_tiles + (first + tile) * kTileBytes, kTileBytes, &shared.v_full[s]);
    }
  }
}

// ---- a consumer warpgroup

struct Thread {  // where a thread stands in its warpgroup
  int group, warp, quad, q;
  __device__ Thread()
      : group(__shfl_sync(0xFFFFFFFF, threadIdx.x / 128 - 1, 0)),  // (so that the compiler knows it is the warp's)
        warp(threadIdx.x / 32 % 4), quad(threadIdx.x % 32 / 4), q(threadIdx.x % 4) {}
  __device__ int row(int half) const { return 16 * warp + quad + 8 * half; }
  __device__ void meet() const { bar_sync(1 + group, 128); }
};

constexpr int kMine = kDim / kChunk / 4;  // chunks of 8 channels of each row of Q that a thread reads: the quad takes turns

template <Dtype kDtype>
__device__ void load_q(float (&x)[2][kMine * kChunk], const AttentionArgs& args, const Thread& thread, const Work& work) {
  const i64 base = i64(work.batch) * args.q.batch + i64(work.head) * args.q.head;
  Raw<kDtype> raw[2][kMine];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const i32 token = work.first_row + thread.group * kRows + thread.row(half);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int channel = (thread.q + 4 * i) * kChunk;
      raw[half][i] = zero_raw<kDtype>();
      if (token < args.q_len && channel < args.channels) {
        raw[half][i] = load_raw<kDtype>(args.q, base + token * args.q.token, channel);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kMine * kChunk; ++i) x[half][i] = to_float<kDtype>(raw[half][i / kChunk], i % kChunk);
  }
}

// Quantises the warpgroup's rows of Q to shared memory and returns this thread's scale, in base-2 logits.
__device__ float quantize_q(const AttentionArgs& args, Shared& shared, const Thread& thread, const Work& work) {
  float x[2][kMine * kChunk];
  if (args.dtype == kBFloat16) load_q<kBFloat16>(x, args, thread, work);
  else if (args.dtype == kFloat16) load_q<kFloat16>(x, args, thread, work);
  else load_q<kFloat32>(x, args, thread, work);

  float largest = 0.0f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kMine * kChunk; ++i) largest = max_nan_f32(largest, fabsf(x[half][i]));
  }
  const Scale scale = scale_of(shuffle_max_nan(largest, 4), 127.0f);  // the quad's two rows share it
  if (args.lse != nullptr) {
    const float* mean = args.k_mean + (i64(work.batch) * args.kv_heads + work.kv_head) * kDim;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < kMine * kChunk; ++i) {
        dot += x[half][i] * args.sm_scale * mean[(thread.q + 4 * (i / kChunk)) * kChunk + i % kChunk];
      }
      dot += __shfl_xor_sync(0xFFFFFFFF, dot, 1);
      dot += __shfl_xor_sync(0xFFFFFFFF, dot, 2);
      if (thread.q == 0) shared.mean_logit[thread.group][thread.row(half)] = dot;
    }
  }
  const float inverse = args.sm_scale < 0 ? -scale.inverse : scale.inverse;
  thread.meet();  // the last item's rows are no longer read
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int chunk = thread.q + 4 * i;
      const float* y = x[half] + i * kChunk;
      const Vec8 bytes = {int8x4(y[0], y[1], y[2], y[3], inverse), int8x4(y[4], y[5], y[6], y[7], inverse)};
      u8* to = shared.q[thread.group] + swizzled<kDim>(thread.row(half), chunk / 2) + chunk % 2 * 8;
      *reinterpret_cast<Vec8*>(to) = bytes;
    }
  }
  fence_proxy_async();
  thread.meet();
  return __fmul_rn(scale.delta, args.logits_scale);
}

// Two neighbouring channels of the output; their number is a multiple of 8.
__device__ __forceinline__ void store_pair(const AttentionArgs& args, i64 at, float a, float b) {
  if (args.dtype == kFloat32) {
    *reinterpret_cast<Vec8*>(static_cast<float*>(args.out) + at) = {__float_as_uint(a), __float_as_uint(b)};
  } else {
    *reinterpret_cast<u32*>(static_cast<u16*>(args.out) + at) =
        args.dtype == kFloat16 ? cvt_f16x2_f32(b, a) : cvt_bf16x2_f32(b, a);
  }
}

// O / l · δ_V + v̄, and lse. Rows that saw no key give 0 and −∞.
__device__ void finish(const AttentionArgs& args, const Shared& shared, const Thread& thread, const Work& work,
                       const float (&o)[kDim / 2], const Rows& rows) {
  const i64 kv_head = i64(work.batch) * args.kv_heads + work.kv_head;
  const float largest = args.dtype == kFloat16 ? 65504.0f : args.dtype == kBFloat16 ? 3.3895313892515355e38f
                                                                                     : 3.4028234663852886e38f;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = rows.sum[half];
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
    const int row = thread.row(half);
    const i32 token = work.first_row + thread.group * kRows + row;
    if (token >= args.q_len) continue;
    const bool seen = rows.m[half] != -kInfinity;
    const float inverse = seen ? 1.0f / sum : 0.0f;
    const i64 at = work.batch * args.out_batch + work.head * args.out_head + token * args.out_token;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const int channel = 8 * i + 2 * thread.q;
      float x[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float scale = __ldg(args.v_scale + kv_head * kDim + channel + c);
        const float mean = seen ? __ldg(args.v_mean + kv_head * kDim + channel + c) : 0.0f;
        const float exact = o[4 * i + 2 * half + c] * inverse * scale + mean;
        x[c] = max_nan_f32(min_nan_f32(exact, largest), -largest);
      }
      if (channel < args.v_channels) store_pair(args, at + channel, x[0], x[1]);
    }
    if (args.lse != nullptr && thread.q == 0) {
      const float lse = (rows.m[half] + __log2f(sum / args.p_max)) * kLn2 + shared.mean_logit[thread.group][row];
      args.lse[(i64(work.batch) * args.q_heads + work.head) * args.q_len + token] = seen ? lse : -kInfinity;
    }
  }
}

struct Consumer {
  const AttentionArgs& args;
  Shared& shared;
  const Thread thread;
  const bool arrives = threadIdx.x % 32 == 0;  // one lane of each warp
  Ring k_ring, v_ring;

  // Scores of the next tile, not waited for.
  __device__ __forceinline__ void begin_scores(i32 (&scores)[64]) {
    mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
    const u64 q = wgmma_descriptor<kDim>(shared.q[thread.group]), k = wgmma_descriptor<kDim>(shared.k[k_ring.stage]);
    pin_registers(scores);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 32; ++step) {
      wgmma_m64n128k32_s32_s8_ss(scores, q + step * kDescriptorStep, k + step * kDescriptorStep, step > 0);
    }
    wgmma_commit_group();
  }

  // The scores are there: take the tile's K scale and hand the stage back.
  __device__ __forceinline__ float end_scores(i32 (&scores)[64]) {
    wgmma_wait_group<0>();
    pin_registers(scores);
    const float scale = shared.k_scale[k_ring.stage][thread.q];
    release(shared.k_empty, k_ring);
    return scale;
  }

  __device__ __forceinline__ void release(u64 (&empty)[kStages], Ring& ring) {
    if (arrives) mbarrier_arrive(&empty[ring.stage]);
    ring.next();
  }

  template <bool kMasked, bool kMore>
  __device__ __forceinline__ void tile(i32 (&scores)[64], float (&o)[kDim / 2], Rows& rows, float q_scale,
                                       float& k_scale, const Visible& visible) {
    u32 p[16];
    float rescale[2];
    softmax<kMasked>(scores, p, rows, rescale, q_scale * k_scale, args.log2_p_max, visible);

    Sums sums[kParts];
    mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
    const u64 v = wgmma_descriptor<kTileKeys>(shared.v[v_ring.stage]);
    pin_registers(p);
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin_registers(sums[part]);
    wgmma_fence();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int at = part * kSteps + step;  // 32 keys each
        const u32(&four)[4] = reinterpret_cast<const u32(&)[4]>(p[4 * at]);
        multiply_pv(sums[part], four, v + at * kDescriptorStep, step > 0);
      }
    }
    wgmma_commit_group();
    if constexpr (kMore) {
      begin_scores(scores);
      wgmma_wait_group<1>();
    } else {
      wgmma_wait_group<0>();
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) pin_registers(sums[part]);
    release(shared.v_empty, v_ring);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) {
        const float sum = sum_of(sums[part], i);
        o[i] = part == 0 ? __fmaf_rn(o[i], rescale[i / 2 % 2], sum) : o[i] + sum;
      }
    }
    if constexpr (kMore) k_scale = end_scores(scores);
  }

  __device__ __forceinline__ Visible visible(i32 first_row, i32 tile) const {
    const i32 key = tile * kTileKeys + 2 * thread.q;
    return {{last_key(first_row + thread.row(0), args.causal_offset, args.kv_len) - key,
             last_key(first_row + thread.row(1), args.causal_offset, args.kv_len) - key}};
  }

  __device__ __forceinline__ void work_on(const Work& work) {
    const i32 first_row = work.first_row + thread.group * kRows;
    const KeyTiles mine = key_tiles(first_row, kRows, args.q_len, args.causal_offset, args.kv_len);
    const KeyTiles all = key_tiles(work.first_row, kConsumers * kRows, args.q_len, args.causal_offset, args.kv_len);
    const float q_scale = quantize_q(args, shared, thread, work);
    float o[kDim / 2];
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) o[i] = 0.0f;
    Rows rows = {{-kInfinity, -kInfinity}, {0.0f, 0.0f}};
    if (mine.count > 0) {
      i32 scores[64];
      begin_scores(scores);
      float k_scale = end_scores(scores);
      const i32 last = mine.count - 1, full = min(mine.full, last);
      i32 j = 0;
      for (; j < full; ++j) tile<false, true>(scores, o, rows, q_scale, k_scale, {});
      for (; j < last; ++j) tile<true, true>(scores, o, rows, q_scale, k_scale, visible(first_row, j));
      tile<true, false>(scores, o, rows, q_scale, k_scale, visible(first_row, last));
    }
    for (i32 j = mine.count; j < all.count; ++j) {  // tiles that only the other warpgroup's rows see
      mbarrier_wait(&shared.k_full[k_ring.stage], k_ring.parity);
      release(shared.k_empty, k_ring);
      mbarrier_wait(&shared.v_full[v_ring.stage], v_ring.parity);
      release(shared.v_empty, v_ring);
    }
    finish(args, shared, thread, work, o, rows);
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, 1) attention_wgmma(const __grid_constant__ AttentionArgs args) {
  extern __shared__ __align__(1024) u8 memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&shared.k_full[s], 1), mbarrier_init(&shared.v_full[s], 1);
      mbarrier_init(&shared.k_empty[s], 4 * kConsumers), mbarrier_init(&shared.v_empty[s], 4 * kConsumers);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    setmaxnreg_dec<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args, shared);
  } else {
    setmaxnreg_inc<kConsumerRegisters>();
    Consumer consumer{args, shared, Thread()};
    for (i32 item = blockIdx.x; item < args.items; item += gridDim.x) {
      consumer.work_on(work_item(item, args.q_blocks, kConsumers * kRows, args.q_heads, args.kv_heads));
    }
  }
}
