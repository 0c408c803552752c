// A warp of attention_mma: scores, softmax and P·V of its 32 rows, tile after tile, and O on its way to the caller.
#pragma once
#include "common/epilogue.cuh"
#include "common/softmax.cuh"
#include "mma/block.cuh"
#include "mma/multiply.cuh"
#include "ptx/barrier.cuh"

struct Warp {
  const MmaArgs& args;
  const int warp, lane, quad, lane_in_quad;
  u32 q_at;           // shared address of the lane's ldmatrix row of Q
  u32 k_at, v_at;     // of its rows of K and V, in the first stage
#if SMOOTH_Q
  u32 delta_at;       // of its keys' ΔS, likewise
#endif
  // From there to the stage that comes next: the same for all threads, so it lies in a uniform register, which ldmatrix
  // adds by itself; the lane's addresses never change, nor do those that the swizzle makes of them.
  u32 stage = 0;
  float q_scale;                               // δ_Q · logits_scale of the lane's four rows
  float base[2][2];   // of a row: log2 P_r − m, rounded down, what is added to its logits; ∞ before the first key
  float sum[2][2];    // of a row: Σ P
  float o[2][kDim / 8][4];

  __device__ __forceinline__ Warp(const MmaArgs& args, Shared& shared)
      : args(args),
        warp(__shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0)),  // (so that the compiler knows it is the warp's)
        lane(threadIdx.x % 32),
        quad(threadIdx.x % 32 / 4),
        lane_in_quad(threadIdx.x % 4) {
    const int matrix = lane / 8, row = lane % 8;
    // A: rows 0–7, 8–15 of the first 16 bytes, then of the second; B: both halves of keys 0–7, then of keys 8–15. In the
    // next 32 bytes the chunks' places differ by an exclusive or.
    q_at = shared_address(shared.q[warp]) + swizzled<kQkRowBytes>(matrix % 2 * 8 + row, matrix / 2);
    k_at = shared_address(shared.stages[0].k) + swizzled<kQkRowBytes>(matrix / 2 * 8 + row, matrix % 2);
    // FP16, transposed: keys 0–7 and 8–15 of eight channels, then of the next eight. E4M3: all 64 keys of eight channels.
    v_at = shared_address(shared.stages[0].v) +
           (V_HALF ? swizzled<kVRowBytes>(matrix % 2 * 8 + row, matrix / 2) : swizzled<kVRowBytes>(row, matrix));
    pin_register(q_at), pin_register(k_at), pin_register(v_at);
#if SMOOTH_Q
    delta_at = shared_address(shared.stages[0].delta) + warp / 4 * 4 * kTileKeys + 8 * lane_in_quad;
    pin_register(delta_at);
#endif
#pragma unroll
    for (int i = 0; i < 4; ++i) base[i / 2][i % 2] = kInfinity, sum[i / 2][i % 2] = 0.0f;
#pragma unroll
    for (int i = 0; i < kDim; ++i) o[i / (kDim / 2)][i / 4 % (kDim / 8)][i % 4] = 0.0f;
  }

  // The count never is −1; to ask for its sign would take a shift.
  __device__ __forceinline__ void fence() const { pmevent_if(args.tile_count == -1); }

  __device__ __forceinline__ int row(int block, int half) const { return warp * kWarpRows + 16 * block + 8 * half + quad; }

  // Where the MMAs start: kMagicBits, so that the scores come out as floats, and in it ΔS in units of the scores.
  template <bool kMasked>
  __device__ __forceinline__ void scores_begin(i32 (&c)[4], int n, float inverse_factor) const {
#if SMOOTH_Q
    if constexpr (!kMasked) {
      const Vec8 pair = ld_shared_v2(delta_at + stage + 32 * n);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float begin = __fmaf_rn(__uint_as_float(pair.word[i]), inverse_factor, kMagic);
        c[i] = __float_as_int(begin);
        // The other row's. Plainly copied, the assembler would know that they are equal, and copy all four for each MMA.
        c[i + 2] = __float_as_int(__fadd_rn(begin, 0.0f));
      }
    } else
#endif
    {
#pragma unroll
      for (int i = 0; i < 4; ++i) c[i] = kMagicBits;
    }
  }

  template <bool kMasked>
  __device__ __forceinline__ void compute_scores(i32 (&s)[2][kScores], float inverse_factor) {
    constexpr int kSteps = kQkRowBytes / 32;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      u32 a[2][4];
#pragma unroll
      for (int block = 0; block < 2; ++block) ldmatrix_m8n8_x4(a[block], (q_at ^ 32 * step) + block * 16 * kQkRowBytes);
#pragma unroll
      for (int n = 0; n < kTileKeys / 8; n += 2) {
        u32 b[4];
        ldmatrix_m8n8_x4(b, (k_at ^ 32 * step) + stage + n * 8 * kQkRowBytes);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          i32 c[4];
          if (step == 0) scores_begin<kMasked>(c, n + j, inverse_factor);
#pragma unroll
          for (int block = 0; block < 2; ++block) {
            i32(&d)[4] = reinterpret_cast<i32(&)[4]>(s[block][4 * (n + j)]);
            multiply_qk(d, a[block], b[2 * j], b[2 * j + 1], step == 0 ? c : d);
          }
        }
      }
    }
  }

  // Scores of a tile that hides keys, or whose factor needs the exact path, to logits, exactly; hidden ones to −∞.
  __device__ __forceinline__ void to_logits(i32 (&s)[kScores], float factor, const Visible& visible) const {
    constexpr float kLargestLogit = 3.4028234663852886e38f;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      float x = __fmul_rn(float(s[i] - kMagicBits), factor);
#if SMOOTH_Q
      x = __fadd_rn(x, __uint_as_float(ld_shared(delta_at + stage + i / 4 * 32 + i % 2 * 4)));
#endif
      x = max_nan_f32(min_nan_f32(x, kLargestLogit), -kLargestLogit);
#if MASK_BIAS
      const u16 bias = visible.bias[i / 2 % 2 * kNextBiasRow + i / 8 * kNextRun + i / 4 % 2 * 2 + i % 2];
      s[i] = __float_as_int(bias == kHidingHalf ? -kInfinity : x + cvt_f32_f16(bias));
#else
      s[i] = visible.hides(i) ? __float_as_int(-kInfinity) : __float_as_int(x);
#endif
    }
  }

  // The smallest base that the thread's keys let each row have, rounded down so that P never exceeds P_r.
  template <bool kMasked>
  __device__ __forceinline__ void smallest_base(const i32 (&s)[kScores], float factor, float (&out)[2]) const {
    const float of_zero = fma_rm_f32(kMagic, factor, args.log2_p_max);  // log2 P_r + kMagic · factor
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if constexpr (kMasked) {
        float top = -kInfinity;
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          if (i / 2 % 2 == half) top = max_nan_f32(top, __int_as_float(s[i]));
        }
        out[half] = sub_rm_f32(args.log2_p_max, top);
      } else {
        i32 top = s[2 * half];  // (as floats they are positive, so they compare like integers)
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          if (i / 2 % 2 == half) top = max(top, s[i]);
        }
        out[half] = fma_rm_f32(-__int_as_float(top), factor, of_zero);
      }
    }
  }

  // The base of the tile, in a quad's threads alike, and what O is to be multiplied with.
  template <bool kMasked>
  __device__ __forceinline__ void update(float (&mine)[2], float (&base)[2], float (&scale)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float old = base[half];
      mine[half] = min_nan_f32(mine[half], __shfl_xor_sync(0xFFFFFFFF, mine[half], 1));
      mine[half] = min_nan_f32(mine[half], __shfl_xor_sync(0xFFFFFFFF, mine[half], 2));
      base[half] = min_nan_f32(old, mine[half]);
      // 2^(m_old − m_new); 0 where nothing was summed yet: new − ∞
      scale[half] = (kMasked && base[half] == kInfinity ? 0.0f : base[half]) - old;
      pin_register(scale[half]);  // (so that the new base can take the old one's register)
    }
  }

  // P of one m16 block, as the next MMA's A fragments.
  template <bool kMasked>
  __device__ __forceinline__ void exponentials(i32 (&s)[kScores], u32 (&p)[kPRegisters], const float (&row_base)[2],
                                               float (&row_sum)[2], float factor) const {
    float base[2];  // added to s · factor
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (kMasked) base[half] = row_base[half] == kInfinity ? 0.0f : row_base[half];
      else base[half] = fma_rm_f32(-kMagic, factor, row_base[half]);
    }
#pragma unroll
    for (int i = 0; i < kScores; i += 8) {  // 16 keys
      float e[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float x = __int_as_float(s[i + j]), b = base[j / 2 % 2];
        e[j] = ex2_approx_ftz_f32(kMasked ? x + b : __fmaf_rn(x, factor, b));
      }
#if !SUM_IN_MMA
      row_sum[0] += (e[0] + e[1]) + (e[4] + e[5]);
      row_sum[1] += (e[2] + e[3]) + (e[6] + e[7]);
#endif
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#if V_HALF
        p[i / 2 + half] = cvt_f16x2_f32(e[2 * half + 1], e[2 * half]);
        p[i / 2 + half + 2] = cvt_f16x2_f32(e[2 * half + 5], e[2 * half + 4]);
#else
        p[i / 4 + half] = mov_b32_u16x2(cvt_e4m3x2_f32(e[2 * half + 5], e[2 * half + 4]),
                                        cvt_e4m3x2_f32(e[2 * half + 1], e[2 * half]));
#endif
      }
    }
  }

  // O · scale + P·V, and the row sum's share.
  __device__ __forceinline__ void multiply_values(const u32 (&p)[2][kPRegisters], const float (&scale)[2][2]) {
    constexpr int kWide = V_HALF ? 16 : 8;           // channels at a time
    constexpr int kSteps = kTileKeys / kPvDepth;     // MMAs in a row
#pragma unroll
    for (int channels = 0; channels < kDim; channels += kWide) {
#if PROMOTE
      Sums sums[2][kWide / 8] = {};
#endif
      if (channels % kFencedChannels == 0 && channels > 0) fence();
      u32 b[4];
      if (!V_HALF) ldmatrix_m8n8_x4(b, v_at + stage + channels * kVRowBytes);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (V_HALF) ldmatrix_m8n8_x4_trans(b, (v_at ^ 2 * channels) + stage + step * 16 * kVRowBytes);
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          const u32(&a)[4] = reinterpret_cast<const u32(&)[4]>(p[block][4 * step]);
#pragma unroll
          for (int j = 0; j < kWide / 8; ++j) {
            const int first = 2 * (V_HALF ? j : step);
#if PROMOTE
            multiply_pv(sums[block][j], a, b[first], b[first + 1], sums[block][j]);
#else
            Sums& to = o[block][channels / 8 + j];
            multiply_pv(to, a, b[first], b[first + 1], to);
#endif
          }
        }
      }
#if PROMOTE
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const int block = i / (kWide / 2), j = i / 4 % (kWide / 8);
        float& x = o[block][channels / 8 + j][i % 4];
        x = __fmaf_rn(x, scale[block][i % 4 / 2], sum_of(sums[block][j], i % 4));
      }
#endif
    }
#if SUM_IN_MMA
    constexpr u32 kFourOnes = 0x38383838;  // E4M3
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      Sums sums = {};
#pragma unroll
      for (int step = 0; step < kPvSteps; ++step) {
        multiply_pv(sums, reinterpret_cast<const u32(&)[4]>(p[block][4 * step]), kFourOnes, kFourOnes, sums);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[block][half] = __fmaf_rn(sum[block][half], scale[block][half], sum_of(sums, 2 * half));
      }
    }
#endif
  }

  // What the lane's rows of an m16 block see of a tile.
  __device__ __forceinline__ Visible visible(const Work& work, int block, i32 tile) const {
#if LISTS_TILES
    const i32 of_rows = i32(args.mask.row_block(work.batch, work.head, work.first_row + row(block, 0))) * args.mask.row_step;
    const i32 of_tile = args.mask.block_of_tile(args.mask.tile_at(tile_list(args, work), tile));
    const i64 number = of_rows + args.mask.block_of_plane(work.batch, work.head) + of_tile;
#if MASK_BIAS
    return {args.mask.bias + number * (kMaskRows * TILE_KEYS) + bias_of_row(row(block, 0) % kMaskRows, lane_in_quad)};
#else
    const i64 word = number * (kMaskRows * 4) + row(block, 0) % kMaskRows * 4 + lane_in_quad;
    return {{args.mask.bits[word], args.mask.bits[word + 8 * 4]}};
#endif
#else
    const i32 key = tile * kTileKeys + 2 * lane_in_quad, kv_len = keys_of(args, work), offset = causal_offset_of(args, work);
    return {{Mask::last_key(work.first_row + row(block, 0), offset, kv_len) - key,
             Mask::last_key(work.first_row + row(block, 1), offset, kv_len) - key}};
#endif
  }

  // One tile. kMasked: it hides keys, or its factor needs the exact path.
  template <bool kMasked>
  __device__ __forceinline__ void advance(float k_scale, const Work& work, i32 tile) {
    float factor = q_scale * k_scale;
    if (kMasked) factor = min_nan_f32(factor, kLargestFactor);
    float inverse_factor = 0.0f;
#if SMOOTH_Q
    if (!kMasked) inverse_factor = fminf(rcp_approx_ftz_f32(factor), kLargestFactor);  // (0: a group of zeros)
#endif
    i32 s[2][kScores];
    compute_scores<kMasked>(s, inverse_factor);
    if constexpr (kMasked) {
#pragma unroll
      for (int block = 0; block < 2; ++block) to_logits(s[block], factor, visible(work, block, tile));
    }
    float mine[2][2], scale[2][2];
    u32 p[2][kPRegisters];
#pragma unroll
    for (int block = 0; block < 2; ++block) smallest_base<kMasked>(s[block], factor, mine[block]);
#pragma unroll
    for (int block = 0; block < 2; ++block) update<kMasked>(mine[block], base[block], scale[block]);
#if !PROMOTE
    const bool moved = __any_sync(0xFFFFFFFF, scale[0][0] < 0 || scale[0][1] < 0 || scale[1][0] < 0 || scale[1][1] < 0);
#endif
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scale[i / 2][i % 2] = ex2_approx_ftz_f32(scale[i / 2][i % 2]);
#if !SUM_IN_MMA
      sum[i / 2][i % 2] *= scale[i / 2][i % 2];
#endif
    }
    if (kFencedPhases) fence();
#pragma unroll
    for (int block = 0; block < 2; ++block) exponentials<kMasked>(s[block], p[block], base[block], sum[block], factor);
#if !PROMOTE
    if (moved) {
#pragma unroll
      for (int i = 0; i < kDim; ++i) {
        o[i / (kDim / 2)][i / 4 % (kDim / 8)][i % 4] *= scale[i / (kDim / 2)][i % 4 / 2];
      }
    }
#endif
    if (kFencedPhases) fence();
    multiply_values(p, scale);
  }

  // O / l · δ_V + v̄, and lse. Rows that saw no key give 0 and −∞, others that are spoilt NaN.
  template <Dtype kDtype>
  __device__ __forceinline__ void finish(const Shared& shared, const Work& work) {
    const u32 spoilt = shared.spoilt[threadIdx.x];
    const i64 channels = (i64(work.batch) * args.kv_heads + work.kv_head) * kDim + 2 * lane_in_quad;
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      float inverse[2], seen[2];
      const i32 token = work.first_row + row(block, 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[block][half];
#if !SUM_IN_MMA
        total += __shfl_xor_sync(0xFFFFFFFF, total, 1);
        total += __shfl_xor_sync(0xFFFFFFFF, total, 2);
#endif
        if (spoilt >> (2 * block + half) & 1) total = kNaN;
        const bool blind = base[block][half] == kInfinity;
        seen[half] = blind ? 0.0f : 1.0f;
        inverse[half] = blind ? 0.0f : 1.0f / total;
        if (args.lse != nullptr && lane_in_quad == 0 && token + 8 * half < rows_of(args, work)) {
          float& lse = args.lse[first_lse(args, work) + token + 8 * half];
          // Σ P = P_r · Σ 2^(x − m) = Σ 2^(x + base); lse already holds q · k̄
          lse = blind ? -kInfinity : (__log2f(total) - base[block][half]) * kLn2 + lse;
        }
      }
      const i64 at = output_base(args, work) + token * args.out_token + 2 * lane_in_quad;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        const Vec8 v_scale = *reinterpret_cast<const Vec8*>(args.v_scale + channels + 8 * i);
        const Vec8 v_mean = *reinterpret_cast<const Vec8*>(args.v_mean + channels + 8 * i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float y[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float scaled = o[block][i][2 * half + c] * inverse[half] * __uint_as_float(v_scale.word[c]);
            y[c] = __fmaf_rn(__uint_as_float(v_mean.word[c]), seen[half], scaled);
            y[c] = max_nan_f32(min_nan_f32(y[c], kLargest<kDtype>), -kLargest<kDtype>);
          }
          if (token + 8 * half < rows_of(args, work) && 8 * i < args.v_channels) {
            store_pair<kDtype>(args.out, at + 8 * half * args.out_token + 8 * i, y[0], y[1]);
          }
        }
      }
    }
  }
};
