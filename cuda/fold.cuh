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

// 0xffffffff, of which ptxas knows neither the value nor how to compute it again.
__device__ __forceinline__ uint32_t all_ones() {
  uint32_t v;
  asm volatile(
      "{\n .reg .pred always;\n setp.eq.u32 always, 0, 0;\n"
      " vote.sync.ballot.b32 %0, always, 0xffffffff;\n}"
      : "=r"(v));
  return v;
}
__device__ __forceinline__ uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Numbers that ptxas should not know: it would multiply by them with shifts and complements on the
// ALU, which is what unpacking waits for, and load the floats again for each table.
struct Constants {
  uint32_t ones, byte, half;  // 0xffffffff, 1 << 8, 1 << 16
  float base[3];              // 2**23 + 0, 256, 180: see four_codes
};
__device__ __forceinline__ Constants constants() {
  const uint32_t ones = all_ones(), zero = ~ones;
  const auto base = [&](uint32_t even) { return __uint_as_float(zero + 0x4b000000 + even); };
  return {ones, zero + (1 << 8), zero + (1 << 16), {base(0), base(256), base(180)}};
}

// The bits of base + round(code * scale), ties to even: from 2**23 on the unit in the last place is
// 1, and the fused multiply-add rounds once. `base` is even.
__device__ __forceinline__ uint32_t scaled_code(float code, float scale, float base) {
  float d;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(d) : "f"(code), "f"(scale), "f"(base));
  return __float_as_uint(d);
}
// Those integers of codes first, first + 1, .. + 3, a byte each from the lowest on. 2**23 has the
// bits 0x4b000000, and 0x4b + 1 + 180 = 256 leaves the word. An integer above 255 spoils the bytes
// above its own, whose codes are larger: none of them occurs.
__device__ __forceinline__ uint32_t four_codes(float first, float scale, const Constants& c) {
  const uint32_t low = multiply_add(scaled_code(first + 1, scale, c.base[0]), c.byte,
                                    scaled_code(first, scale, c.base[0]));
  const uint32_t high = multiply_add(scaled_code(first + 3, scale, c.base[2]), c.byte,
                                     scaled_code(first + 2, scale, c.base[1]));
  return multiply_add(high, c.half, low);
}

// The table of one group of one channel, made of the integers of codes 1 to 8. Codes that do not
// occur there may have left int8; forcing each entry's sign keeps them from spoiling their
// partner's mask.
//
// field: S in the upper 13 bits and a correction of -4..3 units in the last place of S * unit in
// the lower three, unit = 127 / m rounded: with it every product that occurs rounds exactly as the
// rational number does (the host has checked all of them).
__device__ __forceinline__ uint4 build_table(uint32_t field, float unit, const Constants& c) {
  const float product = mul_rn(float(int(field >> 3)), unit);
  const float scale = __int_as_float(__float_as_int(product) + (int(field << 29) >> 29));
  const uint32_t small = four_codes(1, scale, c) & 0x7f7f7f7f;  // of 1, 2, 3, 4
  const uint32_t large = four_codes(5, scale, c) & 0x7f7f7f7f;  // of 5, 6, 7, 8
  // Bytes 128 - x: -x is one with bit 7 set, and ~-x = x - 1 its complement without bit 7.
  const uint32_t small_negative = multiply_add(small, c.ones, 0x80808080);
  const uint32_t large_negative = multiply_add(large, c.ones, 0x80808080);
  return make_uint4(small * c.byte, small_negative | 0x80808080,
                    permute(~large_negative & 0x7f7f7f7f, 0, 0x0123),
                    permute(large, small, 0x7012));
}
// The table that gives the codes themselves.
__device__ __forceinline__ uint4 identity_table() {
  return make_uint4(0x03020100, 0xfcfdfeff, 0x04050607, 0x04050607);
}

// ~v as v * -1 - 1: the ALU is what unpacking waits for, and the FMA pipe has time. ptxas would not
// see it so if it knew `ones`.
__device__ __forceinline__ uint32_t flip(uint32_t v, uint32_t ones) {
  return multiply_add(v, ones, ones);
}

// Eight nibbles to eight int8: the low four to `low`, the high four to `high`.
__device__ __forceinline__ void look_up(uint32_t& low, uint32_t& high, uint32_t nibbles,
                                        uint4 table, uint32_t ones) {
  const uint32_t upper = nibbles >> 16;
  low = permute(table.x, table.y, nibbles) ^ permute(table.z, table.w, flip(nibbles, ones));
  high = permute(table.x, table.y, upper) ^ permute(table.z, table.w, flip(upper, ones));
}
