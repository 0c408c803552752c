// mbarriers, named barriers, fences and the register budget of a warpgroup.
#pragma once
#include "ptx/types.cuh"

__device__ inline void mbarrier_init(u64* barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ inline void mbarrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void mbarrier_arrive_expect_tx(u64* barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Adds 1 to what thread blocks share, and gives what it was: this one's writes before are seen by whoever adds later.
__device__ inline u32 atom_inc_acq_rel_gpu(u32* counter) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
constexpr u32 kSleepNanoseconds = 10000000;  // at most; a waiting warp that sleeps issues nothing

__device__ inline bool mbarrier_try_wait_parity(u64* barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p;\n"
      "  mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2, %3;\n"
      "  selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity), "r"(kSleepNanoseconds)
      : "memory");
  return done != 0;
}
__device__ inline bool mbarrier_test_wait_parity(u64* barrier, u32 parity) {  // without waiting
  u32 done;
  asm volatile(
      "{ .reg .pred p;\n"
      "  mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "  selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}
__device__ inline void mbarrier_wait(u64* barrier, u32 parity) {
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
}
__device__ inline void nanosleep(u32 nanoseconds) { asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds) : "memory"); }
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// With programmatic dependent launch a kernel begins while the one before it ends: it must wait before it reads what
// that one wrote, and that one says when the next may begin. Elsewhere both do nothing.
__device__ inline void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Barrier 0 is __syncthreads'. `threads` counts those that wait and those that only arrive.
__device__ inline void bar_arrive(u32 id, u32 threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ inline void bar_sync(u32 id, u32 threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Shared memory written by ordinary stores is read next by the tensor cores or the copy engine.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The assembler moves no instruction across it: keeps a wait behind the work that it is to overlap with. `never` is
// false at run time, which the compiler must not know; about one clock.
__device__ inline void pmevent_if(bool never) {
  asm volatile(
      "{ .reg .pred p;\n"
      "  setp.ne.s32 p, %0, 0;\n"
      "  @p pmevent 0; }" ::"r"(i32(never))
      : "memory");
}

template <int kRegisters>
__device__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
