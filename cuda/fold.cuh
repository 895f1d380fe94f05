// int4 codes to int8 operands by lookup, for the fold form of sm90_w4a8_gemm.cu.
//
// The fold form multiplies by int8 weights w8 = round_half_even(code * S * 127 / m), where m is
// the largest |code * S| of the channel (at least 127): reference.fold. Within one group of one
// channel w8 is a function of the code, so 16 bytes hold all of it. The host sorts the codes so
// that two PRMT and one XOR look up four of them:
//
//   nibble  bit 3   bits 0..2        0    1    2    3  |  4    5    6    7
//   0..7      0     entry of A       0    1    2    3  | -1   -2   -3   -4
//   8..15     1     entry of B       4    5    6    7  | -5   -6   -7   -8   (stored last to first)
//
// PRMT takes byte `bits 0..2` of eight; where bit 3 is set, it gives eight copies of that byte's
// sign instead. So one PRMT of A with the nibbles and one of B with all their bits flipped leave
// the wanted entry in one and a mask in the other. Entries of A are stored as they are, the
// negative ones of B complemented: the mask is then 0x00 except beside a complemented entry of B,
// where it is 0xff, and XOR gives the entry in all four cases. The host never stores a negative
// code whose w8 is 0 (it stores code 0), because the sign of its entry would be wrong.
#pragma once

// The integer nearest to code * scale, ties to even, in the low byte: the addend 1.5 * 2**23 has
// a unit in the last place of 1, and the fused multiply-add rounds once.
__device__ __forceinline__ uint32_t scaled_code(float code, float scale) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, 0f4B400000;" : "=f"(d) : "f"(code), "f"(scale));
  return __float_as_uint(d);
}
__device__ __forceinline__ uint32_t four_codes(float first, float step, float scale) {
  return lowest_bytes(scaled_code(first, scale), scaled_code(first + step, scale),
                      scaled_code(first + 2 * step, scale), scaled_code(first + 3 * step, scale));
}

// The table of one group of one channel. Codes that do not occur there may have left int8; forcing
// each entry's sign keeps them from spoiling their partner's mask.
//
// field: S in the upper 13 bits and a correction of -4..3 units in the last place of S * unit in
// the lower three, unit = 127 / m rounded: with it every product that occurs rounds exactly as the
// rational number does (the host has checked all of them).
__device__ __forceinline__ uint4 build_table(uint32_t field, float unit) {
  const float product = mul_rn(float(int(field >> 3)), unit);
  const float scale = __int_as_float(__float_as_int(product) + (int(field << 29) >> 29));
  return make_uint4(four_codes(0, 1, scale) & 0x7f7f7f7f, four_codes(-1, -1, scale) | 0x80808080,
                    ~four_codes(-8, 1, scale) & 0x7f7f7f7f, four_codes(7, -1, scale) & 0x7f7f7f7f);
}
// The table that gives the codes themselves.
__device__ __forceinline__ uint4 identity_table() {
  return make_uint4(0x03020100, 0xfcfdfeff, 0x04050607, 0x04050607);
}

// 0xffffffff, which ptxas does not know.
__device__ __forceinline__ uint32_t all_ones() {
  uint32_t bytes;
  asm volatile("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return (bytes >> 31) - 1;
}
// ~v as v * -1 - 1: the ALU is what unpacking waits for, and the FMA pipe has time. ptxas would not
// see it so if it knew `ones`.
__device__ __forceinline__ uint32_t flip(uint32_t v, uint32_t ones) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %2;" : "=r"(d) : "r"(v), "r"(ones));
  return d;
}

// Eight nibbles to eight int8: the low four to `low`, the high four to `high`.
__device__ __forceinline__ void look_up(uint32_t& low, uint32_t& high, uint32_t nibbles,
                                        uint4 table, uint32_t ones) {
  const uint32_t upper = nibbles >> 16;
  low = permute(table.x, table.y, nibbles) ^ permute(table.z, table.w, flip(nibbles, ones));
  high = permute(table.x, table.y, upper) ^ permute(table.z, table.w, flip(upper, ones));
}
