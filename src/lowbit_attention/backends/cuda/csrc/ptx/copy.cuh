// Loads and copies that are not plain C++.
#pragma once
#include "ptx/types.cuh"

// A block of bytes (a multiple of 16, 16-byte aligned on both sides) to shared memory; the barrier counts them.
__device__ inline void cp_async_bulk_shared_global(void* to, const void* from, u32 bytes, u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// The other way; in groups that a thread commits and awaits. (`read`: until shared memory may be written again.)
__device__ inline void cp_async_bulk_global_shared(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ inline void cp_async_bulk_commit_group() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Four 8 × 8 matrices of 16-bit numbers, a lane holding two neighbours of a row of each; lane l has the address of row
// l % 8 of matrix l / 8.
__device__ inline void stmatrix_m8n8_x4(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// Read once: do not keep it in L1.
__device__ inline Vec16 ld_global_nc_v4(const void* from) {
  Vec16 out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
               : "l"(from));
  return out;
}

// Past L1: what another multiprocessor has written.
__device__ inline Vec16 ld_global_cg_v4(const void* from) {
  Vec16 out;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
               : "l"(from)
               : "memory");
  return out;
}

// 16 bytes from global to shared memory, without registers; in groups that a thread commits and awaits.
__device__ inline void cp_async_cg_16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline u32 ld_shared(u32 address) {
  u32 out;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(out) : "r"(address) : "memory");
  return out;
}
__device__ inline Vec8 ld_shared_v2(u32 address) {
  Vec8 out;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(out.word[0]), "=r"(out.word[1]) : "r"(address) : "memory");
  return out;
}
__device__ inline float ld_global_f32(const float* from) {
  float out;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(out) : "l"(from));
  return out;
}

__device__ __forceinline__ u32 ld_global_nc_u32(const u32* from) {
  u32 out;
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(out) : "l"(from));
  return out;
}
__device__ __forceinline__ void prefetch_global_l1(const void* at) { asm volatile("prefetch.global.L1 [%0];" ::"l"(at)); }
