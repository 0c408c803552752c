// The end of a work tile: O and lse.
#pragma once
#include "common/epilogue.cuh"
#include "hopper/mainloop.cuh"
#include "hopper/rows.cuh"
#include "hopper/splits.cuh"

// O / l · δ_V + v̄, and lse. Rows that saw no key give 0 and −∞, others that are spoilt NaN. Where O lies in shared
// memory, `last` says what it is to be multiplied with before the last interval's sums are added.
__device__ __forceinline__ void Consumer::finish(const WorkTile& work, const float (&last)[2]) {
  const i32 token = work.first_row + thread.group * kRows + thread.row(0);
  const u32 spoilt = shared.spoilt[q_ring.stage][thread.group][thread.warp][thread.quad];
  float inverse[2], seen[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = before().sum[half];
#if SUM_IN_MMA
    if (kInterval > 1) sum = __fmaf_rn(sum, last[half], row_sum(sums, half));
#endif
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 1);
    sum += __shfl_xor_sync(0xFFFFFFFF, sum, 2);
    if (spoilt >> half & 1) sum = kNaN;
    seen[half] = rows.m[half] == -kInfinity ? 0.0f : 1.0f;
    inverse[half] = rows.m[half] == -kInfinity ? 0.0f : 1.0f / sum;
    if (args.lse != nullptr && thread.lane_in_quad == 0 && token + 8 * half < work.end_row) {
      const float mean_logit = shared.mean_logit[q_ring.stage][thread.group][thread.row(half)];
      args.lse[Sequence{args, work}.in_lse(token) + 8 * half] =
          rows.m[half] == -kInfinity ? -kInfinity : (rows.m[half] + __log2f(sum / args.p_max)) * kLn2 + mean_logit;
    }
  }
#if ROWS_THROUGH_SHARED
  u32 y[kDim / 8][2];
#else
  const i64 at = Sequence{args, work}.in_output(token) + 2 * thread.lane_in_quad;
  const i32 channels[2] = {token < work.end_row ? args.v_channels : 0, token + 8 < work.end_row ? args.v_channels : 0};
#endif
  const auto keep = [&](int i, const float (&x)[4]) {
    if (i % 4 == 0) pmevent_if(args.items < 0);  // (else the assembler loads more at once than registers are left)
    const Vec8 scale = *reinterpret_cast<const Vec8*>(&shared.v_scale[q_ring.stage][8 * i + 2 * thread.lane_in_quad]);
    const Vec8 mean = *reinterpret_cast<const Vec8*>(&shared.v_mean[q_ring.stage][8 * i + 2 * thread.lane_in_quad]);
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
__device__ __forceinline__ void Consumer::clear_output() {
  await_rows_sent();
#pragma unroll 1
  for (int four = 0; four < kDim / 8; ++four) shared.o[thread.group][thread.warp][four][threadIdx.x % 32] = {};
}

// Whether all splits of the keys have been summed up; if so, O and the row sum are those of all.
__device__ __forceinline__ bool Consumer::ends_splits(const WorkTile& work, float (&last)[2]) {
  promote<false, 0>(sums, last);
  if (!last_of_splits(args, work, thread, shared.o[thread.group][thread.warp], rows, before())) return false;
  last[0] = last[1] = 1.0f;
  clear_sums();
  return true;
}
#endif

__device__ __forceinline__ void Consumer::epilogue() {
  float last_scale[2] = {0.0f, 0.0f};
  if constexpr (kInterval > 1) before().promote<true>(rows.m, last_scale);
  const WorkTile done = shared.work[q_ring.stage];  // (read again, instead of keeping it all the while)
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
