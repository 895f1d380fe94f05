// What every kernel family shares: number formats, exactly rounded arithmetic, and the PTX for
// asynchronous copies and tensor cores. Included by text (the host pastes it in), so that a
// kernel's cache key covers it; nothing here needs a header, since NVRTC has none.
//
// Arithmetic goes through the functions below, never through + * / on floats: CuPy compiles with
// -ftz=true and NVRTC contracts to FMA by default, and either changes the bits that
// reference.py defines. Inline PTX is immune to both.
#pragma once

#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using uint16_t = unsigned short;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

// Element types of activations and outputs, chosen by -DDTYPE=...
#define BF16 0
#define FP16 1
#define INT32 2  // outputs only: the accumulators themselves, for the tests

// Hides from the compiler where `v` comes from: it neither computes it again nor draws what follows
// from it out of a loop.
template <typename T>
__device__ __forceinline__ T opaque(T v) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(v));
  } else {
    asm volatile("" : "+r"(v));
  }
  return v;
}
__device__ __forceinline__ float opaque(float v) {
  asm volatile("" : "+f"(v));
  return v;
}

__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// Maxima of the upper and of the lower halves, unsigned.
__device__ __forceinline__ uint32_t max_of_halves(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
  uint32_t d;
  asm("max.u16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return max(a, b) & 0xffff0000 | max(a << 16, b << 16) >> 16;
#endif
}
// The lowest bytes of four words.
__device__ __forceinline__ uint32_t lowest_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  return permute(permute(a, b, 0x40), permute(c, d, 0x40), 0x5410);
}

// ---- exactly rounded float32 -------------------------------------------------------------------

__device__ __forceinline__ float mul_rn(float a, float b) {
  float d;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float add_rn(float a, float b) {
  float d;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float sub_rn(float a, float b) {
  float d;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float div_rn(float a, float b) {
  float d;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
__device__ __forceinline__ float sqrt_rn(float a) {
  float d;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}
// x within -limit..limit; a NaN becomes one of them.
__device__ __forceinline__ float clamp(float x, float limit) {
  float d;
  asm("min.f32 %0, %1, %2;" : "=f"(d) : "f"(x), "f"(limit));
  asm("max.f32 %0, %1, %2;" : "=f"(d) : "f"(d), "f"(-limit));
  return d;
}
__device__ __forceinline__ float int_to_float(int a) {
  float d;
  asm("cvt.rn.f32.s32 %0, %1;" : "=f"(d) : "r"(a));
  return d;
}

// After adding 1.5 * 2**23 the unit in the last place is 1: the integer nearest to x, ties to even,
// is in the lowest bits of the sum. For |x| below 2**22.
constexpr float kRound = 12582912.0f;

// reference.exp2 of a number, not of a NaN.
__device__ __forceinline__ float exp2_reference(float x) {
  x = clamp(x, 100.0f);
  const float n = add_rn(x, kRound), r = sub_rn(x, sub_rn(n, kRound));
  float p = 0.009582855f;
  p = add_rn(mul_rn(p, r), 0.05590643f);
  p = add_rn(mul_rn(p, r), 0.240241f);
  p = add_rn(mul_rn(p, r), 0.6931242f);
  p = add_rn(mul_rn(p, r), 1.0f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(n) << 23));
}

// reference.reciprocal
__device__ __forceinline__ float reciprocal_reference(float x) {
  float y = __int_as_float(0x7ef07580 - __float_as_int(x));
  y = mul_rn(y, sub_rn(2.0019f, mul_rn(x, y)));
  return mul_rn(y, sub_rn(2.0f, mul_rn(x, y)));
}

// ---- 16-bit floats -----------------------------------------------------------------------------

template <int dtype>
__device__ __forceinline__ float to_float(uint16_t bits) {
  float d;
  if constexpr (dtype == BF16) {
    d = __uint_as_float(uint32_t(bits) << 16);
  } else {
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(bits));
  }
  return d;
}
template <int dtype>
__device__ __forceinline__ uint16_t from_float(float x) {
  uint16_t d;
  if constexpr (dtype == BF16) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(d) : "f"(x));
  } else {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
  }
  return d;
}

// Two of them, `low` in the lower half.
template <int dtype>
__device__ __forceinline__ uint32_t from_floats(float low, float high) {
  uint32_t d;
  if constexpr (dtype == BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  }
  return d;
}

// Eight 16-bit floats, the unit of every global access to activations.
template <int dtype>
__device__ __forceinline__ void unpack8(uint4 v, float (&out)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = to_float<dtype>(uint16_t(words[i]));
    out[2 * i + 1] = to_float<dtype>(uint16_t(words[i] >> 16));
  }
}

// Eight, if they are there; otherwise what, added to others, changes nothing, not even a zero's
// sign. Without a branch and, for ptxas, in this order: it would put one behind what waits for
// another.
__device__ __forceinline__ uint4 load8_if(bool there, const uint4* x) {
  constexpr uint32_t kMinusZeros = 0x80008000;
  uint4 v = {kMinusZeros, kMinusZeros, kMinusZeros, kMinusZeros};
  asm volatile(
      "{\n .reg .pred there;\n setp.ne.u32 there, %4, 0;\n"
      " @there ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%5];\n}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "r"(uint32_t(there)), "l"(x)
      : "memory");
  return v;
}

// Activations quantized to int8 lie in blocks of 128 k, [ceil(k / 128)][rows padded to 8][128], so
// that a tile of tokens is contiguous; 16-byte chunk c of a row is stored at chunk c ^ (row % 8),
// which makes reading a column of chunks free of bank conflicts and is what wgmma expects.
// They are followed by kFlagBytes of zeros, flags with which the blocks of sm90_w4a8_gemm.cu meet:
// a kernel that writes activations clears them, and the GEMM leaves them clear.
constexpr int kFlagBytes = 4096;
__device__ __forceinline__ int64_t activation_bytes(int64_t rows_padded, int64_t k) {
  return (k + 127) / 128 * rows_padded * 128;
}
// Offset in bytes of the 16-byte chunk that holds column `k`:
__device__ __forceinline__ int64_t activation_chunk(int64_t row, int64_t rows_padded, uint32_t k) {
  return (k / 128 * rows_padded + row) * 128 + ((k / 16 % 8) ^ uint32_t(row) % 8) * 16;
}

// ---- programmatic dependent launch: nothing happens in an ordinary launch ----------------------

// The next kernel may start, and do what does not depend on this one.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Everything that the kernels before have written is visible.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- asynchronous copies -----------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return uint32_t(__cvta_generic_to_shared(p));
}
// 16 bytes global -> shared, past L1; zeros instead where `valid` is false (nothing is read then).
__device__ __forceinline__ void copy16(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
// 4 bytes, through L1.
__device__ __forceinline__ void copy4(uint32_t shared, const void* global, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(global),
               "r"(valid ? 4 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---- tensor cores ------------------------------------------------------------------------------

// Four 8x8 matrices of 16-bit items, here 8 rows x 16 bytes each, one row address a lane.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&d)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared)
               : "memory");
}
// d[16x8] = a[16x32] * b[32x8] + c, int8 operands, int32 accumulators.
__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                       uint32_t b1, int c0, int c1, int c2, int c3) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c0), "r"(c1), "r"(c2),
        "r"(c3));
}
