// One MMA of 8-bit floats, or a chain of them, on operands of the caller's choice: what does the accumulator keep?
//
// A block works one problem of 64 × 8 outputs: A [64][K] and B [8][K] are E4M3 bytes, K = 32 · steps, C and D are
// float32 [64][8] (FP16 numbers for the f16 accumulators, converted without loss).
//
// A thread of a warp (quad = lane / 4, q = lane % 4) holds of the 16 rows of its warp: rows quad and quad + 8 of A and
// of D, keys 4q … 4q + 3 and 16 + 4q … of A, and columns 2q, 2q + 1 of D.

using u8 = unsigned char;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr int kRows = 64, kColumns = 8, kDepth = 32, kThreads = 128;

// ---- PTX, one instruction a function

__device__ void wgmma_m64n8k32_f32_e4m3(u32 (&d)[4], const u32 (&a)[4], u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1;"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ void wgmma_m64n8k32_f16_e4m3(u32 (&d)[4], const u32 (&a)[4], u64 b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k32.f16.e4m3.e4m3 {%0,%1}, {%2,%3,%4,%5}, %6, 1, 1, 1;"
               : "+r"(d[0]), "+r"(d[1])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ void mma_m16n8k32_f32_e4m3(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void mma_m16n8k32_f16_e4m3(u32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f16.e4m3.e4m3.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
               : "+r"(d[0]), "+r"(d[1])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
__device__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ u32 f16x2_from_f32(float low, float high) {
  u32 out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}
__device__ float f32_from_f16(u32 bits) {
  float out;
  asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h; }" : "=f"(out) : "r"(bits & 0xFFFF));
  return out;
}

// ---- the probe

struct Fragment {  // where this thread's part of the 64 × 8 accumulator lies
  int row, column;
  __device__ Fragment() {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row = 16 * warp + lane / 4, column = 2 * (lane % 4);
  }
};

template <bool kF16>
__device__ void load_accumulator(u32 (&d)[4], const float* c, Fragment at) {
  for (int half = 0; half < 2; ++half) {
    const float* pair = c + (at.row + 8 * half) * kColumns + at.column;
    if constexpr (kF16) {
      d[half] = f16x2_from_f32(pair[0], pair[1]);
    } else {
      d[2 * half] = __float_as_uint(pair[0]), d[2 * half + 1] = __float_as_uint(pair[1]);
    }
  }
}

template <bool kF16>
__device__ void store_accumulator(float* out, const u32 (&d)[4], Fragment at) {
  for (int half = 0; half < 2; ++half) {
    float* pair = out + (at.row + 8 * half) * kColumns + at.column;
    if constexpr (kF16) {
      pair[0] = f32_from_f16(d[half]), pair[1] = f32_from_f16(d[half] >> 16);
    } else {
      pair[0] = __uint_as_float(d[2 * half]), pair[1] = __uint_as_float(d[2 * half + 1]);
    }
  }
}

template <bool kWgmma, bool kF16>
__device__ void probe(const u8* a, const u8* b, const float* c, float* out, int steps) {
  // B for wgmma, without swizzle: two core matrices of 8 columns × 16 keys, 128 bytes each
  __shared__ __align__(128) u8 shared_b[kColumns * kDepth];
  const u64 address = __cvta_generic_to_shared(shared_b);
  const u64 descriptor = (address & 0x3FFFF) >> 4 | u64(128 >> 4) << 16 | u64(256 >> 4) << 32;
  const int keys = kDepth * steps, q = threadIdx.x % 4;
  const Fragment at;
  a += u64(blockIdx.x) * kRows * keys, b += u64(blockIdx.x) * kColumns * keys;
  c += blockIdx.x * kRows * kColumns, out += blockIdx.x * kRows * kColumns;

  u32 d[4];
  load_accumulator<kF16>(d, c, at);
  for (int first = 0; first < keys; first += kDepth) {
    u32 fragment[4];
    for (int i = 0; i < 4; ++i) {
      const int row = at.row + 8 * (i % 2), key = first + 16 * (i / 2) + 4 * q;
      fragment[i] = *reinterpret_cast<const u32*>(a + row * keys + key);
    }
    if constexpr (kWgmma) {
      __syncthreads();
      for (int i = threadIdx.x; i < kColumns * kDepth; i += kThreads) {
        const int column = i / kDepth, key = i % kDepth;
        shared_b[key / 16 * 128 + column * 16 + key % 16] = b[column * keys + first + key];
      }
      fence_proxy_async();
      __syncthreads();
      wgmma_fence();
      if constexpr (kF16) wgmma_m64n8k32_f16_e4m3(d, fragment, descriptor);
      else wgmma_m64n8k32_f32_e4m3(d, fragment, descriptor);
      wgmma_commit();
      wgmma_wait();
    } else {
      const u8* column = b + threadIdx.x % 32 / 4 * keys + first + 4 * q;
      const u32 b0 = *reinterpret_cast<const u32*>(column), b1 = *reinterpret_cast<const u32*>(column + 16);
      if constexpr (kF16) mma_m16n8k32_f16_e4m3(d, fragment, b0, b1);
      else mma_m16n8k32_f32_e4m3(d, fragment, b0, b1);
    }
  }
  store_accumulator<kF16>(out, d, at);
}

extern "C" __global__ void __launch_bounds__(kThreads) wgmma_f16(const u8* a, const u8* b, const float* c, float* d, int n) {
  probe<true, true>(a, b, c, d, n);
}
extern "C" __global__ void __launch_bounds__(kThreads) wgmma_f32(const u8* a, const u8* b, const float* c, float* d, int n) {
  probe<true, false>(a, b, c, d, n);
}
extern "C" __global__ void __launch_bounds__(kThreads) mma_f16(const u8* a, const u8* b, const float* c, float* d, int n) {
  probe<false, true>(a, b, c, d, n);
}
extern "C" __global__ void __launch_bounds__(kThreads) mma_f32(const u8* a, const u8* b, const float* c, float* d, int n) {
  probe<false, false>(a, b, c, d, n);
}
