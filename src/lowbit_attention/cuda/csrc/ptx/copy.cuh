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

// Read once: do not keep it in L1.
__device__ inline Vec16 ld_global_nc_v4(const void* from) {
  Vec16 out;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(out.word[0]), "=r"(out.word[1]), "=r"(out.word[2]), "=r"(out.word[3])
               : "l"(from));
  return out;
}
