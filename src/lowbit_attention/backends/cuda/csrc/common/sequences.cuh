// Sequences of different lengths, one behind the other in [tokens, heads, channels] (SEQUENCES): where each lies, which are
// its tiles and who works on it. All of it is read from device memory, where sequences/sequences.cu writes it: the host
// knows how many tokens and sequences there are, and no length.
//
// "Batch" is a sequence's number in all of the kernels, and batch strides are 0. Packed tiles lie [Hkv][tiles], a sequence's
// one behind the other; statistics [sequences · Hkv].
#pragma once
#include "ptx/types.cuh"

struct SequenceArgs {
  const i32* q_starts;        // [count]: the first token of Q that sees some key
  const i32* q_counts;        // [count]: these, and all after it
  const i32* key_starts;      // [count]: the first token of K and V
  const i32* key_counts;      // [count]: keys that some row sees, the first ones
  const i32* causal_offsets;  // [count]: row i sees key j if j ≤ i + this; 2^30 without causality
  const i32* tile_starts;     // [count + 1]: the first tile of K
  const i32* pack_starts;     // [count + 1]: the first thread block that packs it, of a head
  const i32* order;           // [count]: who is worked on first: those with the most keys
  const i32* item_starts;     // [count + 1]: in that order, the first work tile; at the end, how many there are
  i32 count;
  i32 tokens;                 // of Q
};

// The last of `starts` (`count` of them, ascending) that is not above x: the one, if some are equal, that is not empty.
__device__ inline i32 last_start(const i32* starts, i32 count, i32 x) {
  i32 low = 0, high = count;
  while (high - low > 1) {
    const i32 middle = (low + high) / 2;
    if (starts[middle] <= x) low = middle;
    else high = middle;
  }
  return low;
}
