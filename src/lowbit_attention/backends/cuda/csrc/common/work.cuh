// Which block of query rows a thread block works on.
#pragma once
#include "ptx/types.cuh"

struct Work {
  i32 batch, head, kv_head, first_row;
};

struct Divisor {  // n / d for 0 ≤ n < 2^31 is (n · multiplier) >> shift, both from the host: a division takes registers
  u32 multiplier, shift;
};
__device__ inline i32 divide(i32 n, Divisor by) { return i32(u64(u32(n)) * by.multiplier >> by.shift); }

// Items are blocks of query rows. They are ordered by sections of heads (of all batches), whose K and V fit in L2
// together; in a section by length, the longest first, so that the waves are of equal length.
struct Schedule {
  i32 q_blocks, q_heads, section, section_items;  // section: heads; it divides batch · q_heads
  Divisor by_section_items, by_section, by_q_heads, by_group;  // group: query heads that share a head of K and V
};

__device__ inline Work work_item(i32 item, const Schedule& schedule, i32 rows) {
  const i32 section = divide(item, schedule.by_section_items), place = item - section * schedule.section_items;
  const i32 level = divide(place, schedule.by_section);
  const i32 head = section * schedule.section + place - level * schedule.section;
  const i32 batch = divide(head, schedule.by_q_heads), q_head = head - batch * schedule.q_heads;
  return {batch, q_head, divide(q_head, schedule.by_group), (schedule.q_blocks - 1 - level) * rows};
}
