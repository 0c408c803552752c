// What sequences of different lengths ask for (common/sequences.cuh), from cu_seqlens.
//
// The first thread block writes SequenceArgs' arrays. The others see to the rows that belong to no sequence, and to those
// from which causality hides all keys: their output is 0, and their lse −∞, and no kernel after this one knows of them.
//
// Nothing here trusts cu_seqlens: an offset outside of the tensors, or below one before it, counts as the nearest that is
// neither, so that nobody reads or writes elsewhere.
#include "common/sequences.cuh"
#include "ptx/copy.cuh"
#include "ptx/math.cuh"

struct PrepareSequencesArgs {
  const void* cu_q;           // [count + 1]: sequence i is tokens cu[i] to cu[i + 1] − 1
  const void* cu_k;
  i32 long_q, long_k;         // they are of 64 bits, else of 32
  i32 count, q_tokens, k_tokens;
  i32 is_causal, bottom_right;
  i32 tile_keys, tiles_a_block, q_rows, q_heads;
  i32* q_starts;              // and so on: those of SequenceArgs
  i32* q_counts;
  i32* key_starts;
  i32* key_counts;
  i32* causal_offsets;
  i32* tile_starts;
  i32* pack_starts;
  i32* order;
  i32* item_starts;
  void* out;                  // [q_tokens, q_heads · v_channels], whole 16 bytes a row
  float* lse;                 // [q_heads, q_tokens], or null
  i32 row_bytes;              // of the output
};

constexpr int kPrepareThreads = 1024, kWarps = kPrepareThreads / 32;
// To order more sequences, each looks at all others, would take longer than it saves.
constexpr int kMostOrdered = 4096;
constexpr i32 kNoCausality = 1 << 30;

__device__ i32 boundary(const void* cu, i32 is_long, i32 i, i32 tokens) {
  const i64 at = is_long ? static_cast<const i64*>(cu)[i] : static_cast<const i32*>(cu)[i];
  return i32(min(max(at, i64(0)), i64(tokens)));
}

// How many of a sequence's rows, its first ones, see no key.
__device__ i32 blind_rows(const PrepareSequencesArgs& args, i32 rows, i32 keys) {
  return keys == 0 ? rows : args.is_causal && args.bottom_right ? max(rows - keys, 0) : 0;
}

// What comes before each thread's number in the block, and all of it, added up (or the largest, from 0 on).
struct Scanned {
  i32 before, all;
};
struct Sum {
  __device__ i32 operator()(i32 a, i32 b) const { return a + b; }
};
struct Largest {
  __device__ i32 operator()(i32 a, i32 b) const { return max(a, b); }
};
template <class Add>
__device__ Scanned scanned(i32 mine, i32 (&of_warps)[kWarps], Add add) {
  const i32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  i32 upto = mine;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const i32 other = __shfl_up_sync(0xFFFFFFFF, upto, lanes);
    if (lane >= lanes) upto = add(upto, other);
  }
  const i32 before = __shfl_up_sync(0xFFFFFFFF, upto, 1);
  __syncthreads();  // (what was there has been read)
  if (lane == 31) of_warps[warp] = upto;
  __syncthreads();
  Scanned out = {lane > 0 ? before : 0, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) out.before = add(out.before, of_warps[w]);
    out.all = add(out.all, of_warps[w]);
  }
  return out;
}

// out[i]: `add` of what comes before the i-th (kInclusive: and of it); out[count]: of all.
template <bool kInclusive, class Add, class Number>
__device__ void scan(i32* out, i32 count, Add add, Number number) {
  __shared__ i32 of_warps[kWarps];
  i32 before = 0;
  for (i32 first = 0; first < count; first += kPrepareThreads) {
    const i32 i = first + i32(threadIdx.x), mine = i < count ? number(i) : 0;
    const Scanned found = scanned(mine, of_warps, add);
    const i32 upto = add(before, found.before);
    if (i < count) out[i] = kInclusive ? add(upto, mine) : upto;
    before = add(before, found.all);
  }
  if (!kInclusive && threadIdx.x == 0) out[count] = before;
  __syncthreads();
}

__device__ void write_arrays(const PrepareSequencesArgs& args) {
  scan<true>(args.q_starts, args.count + 1, Largest(), [&](i32 i) { return boundary(args.cu_q, args.long_q, i, args.q_tokens); });
  scan<true>(args.key_starts, args.count + 1, Largest(), [&](i32 i) { return boundary(args.cu_k, args.long_k, i, args.k_tokens); });
  for (i32 i = threadIdx.x; i < args.count; i += kPrepareThreads) {
    const i32 rows = args.q_starts[i + 1] - args.q_starts[i], keys = args.key_starts[i + 1] - args.key_starts[i];
    const i32 blind = blind_rows(args, rows, keys);
    args.q_counts[i] = rows - blind;
    args.order[i] = blind;  // (until the order is known)
    args.causal_offsets[i] = blind + (!args.is_causal ? kNoCausality : args.bottom_right ? keys - rows : 0);
    args.key_counts[i] = blind == rows ? 0 : args.is_causal && !args.bottom_right ? min(keys, rows) : keys;
  }
  __syncthreads();
  for (i32 i = threadIdx.x; i < args.count; i += kPrepareThreads) {
    args.q_starts[i] += args.order[i];
  }
  __syncthreads();
  const auto tiles = [&](i32 i) { return (args.key_counts[i] + args.tile_keys - 1) / args.tile_keys; };
  scan<false>(args.tile_starts, args.count, Sum(), tiles);
  scan<false>(args.pack_starts, args.count, Sum(), [&](i32 i) { return (tiles(i) + args.tiles_a_block - 1) / args.tiles_a_block; });
  for (i32 i = threadIdx.x; i < args.count; i += kPrepareThreads) {
    i32 rank = i;
    if (args.count <= kMostOrdered) {
      const i32 mine = args.key_counts[i];
      rank = 0;
      for (i32 other = 0; other < args.count; ++other) {
        const i32 its = args.key_counts[other];
        rank += its > mine || (its == mine && other < i);
      }
    }
    args.order[rank] = i;
  }
  __syncthreads();
  scan<false>(args.item_starts, args.count, Sum(), [&](i32 i) {
    return (args.q_counts[args.order[i]] + args.q_rows - 1) / args.q_rows * args.q_heads;
  });
}

__device__ void clear_row(const PrepareSequencesArgs& args, i32 token) {
  u8* row = static_cast<u8*>(args.out) + i64(token) * args.row_bytes;
  for (i32 at = threadIdx.x * 16; at < args.row_bytes; at += kPrepareThreads * 16) *reinterpret_cast<Vec16*>(row + at) = {};
  if (args.lse == nullptr) return;
  for (i32 head = threadIdx.x; head < args.q_heads; head += kPrepareThreads) args.lse[i64(head) * args.q_tokens + token] = -kInfinity;
}

// By `blocks` thread blocks, of which this is number `block`.
__device__ void clear_rows(const PrepareSequencesArgs& args, i32 block, i32 blocks) {
  const auto q_boundary = [&](i32 i) { return boundary(args.cu_q, args.long_q, i, args.q_tokens); };
  const auto k_boundary = [&](i32 i) { return boundary(args.cu_k, args.long_k, i, args.k_tokens); };
  const i32 begin = q_boundary(0), end = q_boundary(args.count);
  for (i32 token = block; token < begin; token += blocks) clear_row(args, token);
  for (i32 token = end + block; token < args.q_tokens; token += blocks) clear_row(args, token);
  for (i32 i = block; i < args.count; i += blocks) {
    const i32 first = q_boundary(i), rows = q_boundary(i + 1) - first, keys = max(k_boundary(i + 1) - k_boundary(i), 0);
    const i32 blind = rows > 0 ? blind_rows(args, rows, keys) : 0;
    for (i32 row = 0; row < blind; ++row) clear_row(args, first + row);
  }
}

extern "C" __global__ void __launch_bounds__(kPrepareThreads) prepare_sequences(const __grid_constant__ PrepareSequencesArgs args) {
  if (blockIdx.x == 0) write_arrays(args);
  else clear_rows(args, blockIdx.x - 1, gridDim.x - 1);
}
