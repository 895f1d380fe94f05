// Row-wise work on activations, one block a row (token or expert slot), 16-bit floats in:
//
//   quantize_activation   x [rows, k] -> a8 int8 (layout: common.cuh), token_scale float32 [rows]
//   silu_mul_quantize     gate_up [rows, 2k] -> the same, of silu(gate) * up rounded to DTYPE
//   weighted_sum          y [tokens * topk, n] -> out [tokens, n], slots added in order
//
// Contract: bit-identical to reference.{quantize_activation, silu_mul, moe}. k and n are multiples
// of 8, rows are 16-byte aligned; row strides are in elements. Launch: <<<rows, 256>>>;
// silu_mul_quantize needs 2 * k bytes of dynamic shared memory.
// A row with slot_expert[row] < 0 belongs to no local expert and is skipped (nullptr: none is).
#include "common.cuh"

constexpr int kThreads = 256;
constexpr int kVector = 8;

// Maximum over the block. Magnitudes compare as their bit patterns, where Inf is above every
// finite number and NaN above Inf; fmaxf would lose a NaN.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warp_max[kThreads / 32];
  value = __reduce_max_sync(0xffffffff, value);
  if (threadIdx.x % 32 == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
  value = warp_max[threadIdx.x % (kThreads / 32)];
  return __reduce_max_sync(0xffffffff, value);
}

struct TokenScale {
  float scale;    // what the output is multiplied by
  float inverse;  // 127 / amax, or 0: all codes 0
};

__device__ __forceinline__ TokenScale token_scale_of(uint32_t amax_bits) {
  constexpr uint32_t kInf = 0x7f800000, kSmallest = (127 - 100) << 23;  // 2**-100
  if (amax_bits >= kInf) return {__uint_as_float(0x7fffffff), 0.0f};
  if (amax_bits < kSmallest) return {0.0f, 0.0f};
  const float amax = __uint_as_float(amax_bits);
  return {div_rn(amax, 127.0f), div_rn(127.0f, amax)};
}

// Codes of columns k .. k + 7 of a row.
__device__ __forceinline__ void store_codes(int8_t* a8, int64_t row, int64_t rows_padded, int k,
                                            const float (&x)[kVector], float inverse) {
  uint32_t words[2] = {0, 0};
  if (inverse != 0.0f) {  // else x may hold NaN
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      words[i / 4] |= uint32_t(round_to_int(mul_rn(x[i], inverse)) & 0xff) << (8 * (i % 4));
    }
  }
  int8_t* chunk = a8 + activation_chunk(row, rows_padded, k);
  *reinterpret_cast<uint2*>(chunk + k % 16) = make_uint2(words[0], words[1]);
}

__device__ __forceinline__ void clear_flags(int8_t* a8, int64_t rows_padded, int64_t k) {
  static_assert(kThreads * sizeof(uint4) == kFlagBytes);
  uint4* flags = reinterpret_cast<uint4*>(a8 + activation_bytes(rows_padded, k));
  if (blockIdx.x == 0) flags[threadIdx.x] = make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ uint32_t magnitude(const float (&x)[kVector]) {
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kVector; ++i) largest = max(largest, __float_as_uint(x[i]) & 0x7fffffff);
  return largest;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    quantize_activation(const uint16_t* x, int8_t* a8, float* token_scale, int64_t k,
                        int64_t row_stride, int64_t rows_padded) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  clear_flags(a8, rows_padded, k);
  const int64_t row = blockIdx.x;
  const uint4* in = reinterpret_cast<const uint4*>(x + row * row_stride);
  const int vectors = int(k / kVector);
  constexpr int kHeld = 8;  // of a thread, in registers: loads in flight, and nothing is read twice
  uint4 held[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = threadIdx.x + j * kThreads;
    held[j] = i < vectors ? in[i] : make_uint4(0, 0, 0, 0);
  }
  uint32_t largest = 0;
  float v[kVector];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    unpack8<DTYPE>(held[j], v);
    largest = max(largest, magnitude(v));
  }
  for (int i = threadIdx.x + kHeld * kThreads; i < vectors; i += kThreads) {
    unpack8<DTYPE>(in[i], v);
    largest = max(largest, magnitude(v));
  }
  const TokenScale s = token_scale_of(block_max(largest));
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = threadIdx.x + j * kThreads;
    if (i >= vectors) break;
    unpack8<DTYPE>(held[j], v);
    store_codes(a8, row, rows_padded, i * kVector, v, s.inverse);
  }
  for (int i = threadIdx.x + kHeld * kThreads; i < vectors; i += kThreads) {
    unpack8<DTYPE>(in[i], v);
    store_codes(a8, row, rows_padded, i * kVector, v, s.inverse);
  }
  if (threadIdx.x == 0) token_scale[row] = s.scale;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    silu_mul_quantize(const uint16_t* gate_up, const int* slot_expert, int8_t* a8,
                      float* token_scale, int64_t k, int64_t rows_padded) {
  extern __shared__ uint4 hidden[];  // the row of silu(gate) * up, rounded
  clear_flags(a8, rows_padded, k);
  const int64_t row = blockIdx.x;
  if (slot_expert != nullptr && slot_expert[row] < 0) return;
  const uint4* gates = reinterpret_cast<const uint4*>(gate_up + row * 2 * k);
  const uint4* ups = reinterpret_cast<const uint4*>(gate_up + row * 2 * k + k);
  uint32_t largest = 0;
  for (int64_t i = threadIdx.x; i < k / kVector; i += kThreads) {
    float gate[kVector], up[kVector];
    unpack8<DTYPE>(gates[i], gate);
    unpack8<DTYPE>(ups[i], up);
    uint32_t words[4];
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const float silu = div_rn(gate[j], add_rn(1.0f, exp_reference(sub_rn(0.0f, gate[j]))));
      const uint16_t bits = from_float<DTYPE>(mul_rn(silu, up[j]));
      gate[j] = to_float<DTYPE>(bits);
      words[j / 2] = j % 2 ? words[j / 2] | uint32_t(bits) << 16 : bits;
    }
    hidden[i] = make_uint4(words[0], words[1], words[2], words[3]);
    largest = max(largest, magnitude(gate));
  }
  const TokenScale s = token_scale_of(block_max(largest));
  for (int64_t i = threadIdx.x; i < k / kVector; i += kThreads) {  // its own elements: no barrier
    float v[kVector];
    unpack8<DTYPE>(hidden[i], v);
    store_codes(a8, row, rows_padded, int(i) * kVector, v, s.inverse);
  }
  if (threadIdx.x == 0) token_scale[row] = s.scale;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    weighted_sum(const uint16_t* y, const float* topk_weights, const int* slot_expert,
                 uint16_t* out, int64_t n, int64_t topk) {
  const int64_t token = blockIdx.x;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) {
    float sum = 0.0f;
    for (int64_t slot = token * topk; slot < (token + 1) * topk; ++slot) {
      if (slot_expert[slot] < 0) continue;
      sum = add_rn(sum, mul_rn(topk_weights[slot], to_float<DTYPE>(y[slot * n + i])));
    }
    out[token * n + i] = from_float<DTYPE>(sum);
  }
}
