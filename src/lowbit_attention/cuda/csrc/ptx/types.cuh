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
