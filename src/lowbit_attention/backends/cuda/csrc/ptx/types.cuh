// Short names of the fixed-size types. No CUDA header is included anywhere: NVRTC alone compiles everything.
#pragma once

using i8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

struct alignas(16) Vec16 {  // what one 16-byte load brings
  u32 word[4];
};

struct alignas(8) Vec8 {
  u32 word[2];
};

__device__ inline u32 shared_address(const void* pointer) { return u32(__cvta_generic_to_shared(pointer)); }

// Asked anew each time, so that nothing made of it is kept in a register through a loop.
__device__ inline u32 laneid() {
  u32 lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// The compiler keeps the number in a register and does not compute it again where it is used.
__device__ inline void pin_register(u32& x) { asm volatile("" : "+r"(x)); }
__device__ inline void pin_register(float& x) { asm volatile("" : "+f"(x)); }
template <class Type>
__device__ void pin_register(const Type*& x) {
  asm volatile("" : "+l"(x));
}
__device__ inline i32 pinned(i32 x) {
  asm volatile("" : "+r"(x));
  return x;
}
