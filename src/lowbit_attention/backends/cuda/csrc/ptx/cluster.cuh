// Thread block clusters (Hopper): their barrier, and another block's shared memory.
#pragma once
#include "ptx/types.cuh"

// Every thread of the cluster arrives, then waits; what it wrote before it arrived is seen by all after they waited.
__device__ inline void barrier_cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void barrier_cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Where this block's shared variable lies in block `rank` of the cluster.
__device__ inline u32 mapa_shared_cluster(u32 address, u32 rank) {
  u32 out;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(address), "r"(rank));
  return out;
}
__device__ inline void st_shared_cluster_f32(u32 address, float x) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
