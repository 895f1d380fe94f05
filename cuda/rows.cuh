// Rows of 16-bit floats to int8 and their norm: what the kernels of activation.cu and all_reduce.cu
// share. A block has a row.
#pragma once

constexpr int kMaxThreads = 1024;  // as launched: 16 columns a thread, or 256
constexpr int kVector = 8;
constexpr int kHeld = 2;  // vectors of a thread in registers, so that nothing is read twice

// Maximum over the block.
__device__ __forceinline__ uint32_t block_max(uint32_t value) {
  __shared__ uint32_t warp_max[kMaxThreads / 32];
  const int lane = threadIdx.x % 32;
  value = __reduce_max_sync(0xffffffff, value);
  if (lane == 0) warp_max[threadIdx.x / 32] = value;
  __syncthreads();
  value = lane < blockDim.x / 32 ? warp_max[lane] : 0;
  return __reduce_max_sync(0xffffffff, value);
}

// The largest magnitude of 16-bit floats. They compare as their bit patterns, where Inf is above
// every finite number and NaN above Inf; fmaxf would lose a NaN.
struct Largest {
  uint32_t pair = 0;
  __device__ __forceinline__ void add(uint4 v) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) pair = max_of_halves(pair, words[i] & 0x7fff7fff);
  }
  __device__ __forceinline__ uint32_t bits() const { return max(pair >> 16, pair & 0xffff); }
  __device__ __forceinline__ float of_block() const { return float_of(block_max(bits())); }
  static __device__ __forceinline__ float float_of(uint32_t bits) {
    return to_float<DTYPE>(uint16_t(bits));
  }
};

// What the codes of a row are multiplied by; of one with Inf or NaN, NaN, and 0 if there is next to
// nothing in it.
constexpr uint32_t kInf = 0x7f800000, kSmallest = (127 - 100) << 23;  // 2**-100
__device__ __forceinline__ float token_scale_of(float amax) {
  const uint32_t bits = __float_as_uint(amax);
  if (bits >= kInf) return __uint_as_float(0x7fffffff);
  return bits < kSmallest ? 0.0f : div_rn(amax, 127.0f);
}
// Its inverse, which gives the codes; 0 where all of them are.
__device__ __forceinline__ float inverse_scale_of(float amax) {
  const uint32_t bits = __float_as_uint(amax);
  return bits >= kInf || bits < kSmallest ? 0.0f : div_rn(127.0f, amax);
}

// The integer nearest to x, ties to even, in the lowest byte.
__device__ __forceinline__ uint32_t code_of(float x) { return __float_as_uint(add_rn(x, kRound)); }

// Where a thread puts the codes of vectors i, i + blockDim.x, ... of a row: known before they are.
struct Codes {
  int8_t* a8;
  int64_t first, step;

  __device__ __forceinline__ Codes(int8_t* a8, int64_t row, int64_t rows_padded, uint32_t i)
      : a8(a8),
        first(opaque(activation_chunk(row, rows_padded, i * kVector) + i % 2 * kVector)),
        step(int64_t(blockDim.x / 16) * rows_padded * 128) {}
  __device__ __forceinline__ void store(int j, uint4 v, float inverse) const {
    float x[kVector];
    unpack8<DTYPE>(v, x);
    uint32_t c[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) c[i] = code_of(mul_rn(x[i], inverse));
    uint2 codes = {lowest_bytes(c[0], c[1], c[2], c[3]), lowest_bytes(c[4], c[5], c[6], c[7])};
    if (inverse == 0.0f) codes = {0, 0};  // x may hold NaN
    *reinterpret_cast<uint2*>(a8 + first + j * step) = codes;
  }
};

// Zeros between a row's k and the next multiple of 128, so that no GEMM reads what nobody wrote.
__device__ __forceinline__ void clear_padding(int8_t* a8, int64_t row, int64_t rows_padded, int k) {
  if (k % 128 == 0) return;
  for (int i = k + threadIdx.x * kVector; i < (k + 127) / 128 * 128; i += blockDim.x * kVector) {
    *reinterpret_cast<uint2*>(a8 + activation_chunk(row, rows_padded, i) + i % 16) = {0, 0};
  }
}

__device__ __forceinline__ void clear_flags(int8_t* a8, int64_t rows_padded, int64_t k) {
  uint4* flags = reinterpret_cast<uint4*>(a8 + activation_bytes(rows_padded, k));
  if (blockIdx.x > 0) return;
  for (int i = threadIdx.x; i < kFlagBytes / 16; i += blockDim.x) flags[i] = {0, 0, 0, 0};
}

// Sum over the block, whose warps are a power of two, in the order of reference.rms_norm.
__device__ __forceinline__ float block_sum(float value) {
  __shared__ float warp_sum[kMaxThreads / 32];
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) value = add_rn(value, __shfl_xor_sync(0xffffffff, value, i));
  if (lane == 0) warp_sum[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = blockDim.x / 32;
  value = warp_sum[lane & warps - 1];
#pragma unroll
  for (int i = 16; i > 0; i /= 2) {
    if (i < warps) value = add_rn(value, __shfl_xor_sync(0xffffffff, value, i));
  }
  return value;
}

__device__ __forceinline__ uint4 pack8(const float (&x)[kVector]) {
  return {from_floats<DTYPE>(x[0], x[1]), from_floats<DTYPE>(x[2], x[3]),
          from_floats<DTYPE>(x[4], x[5]), from_floats<DTYPE>(x[6], x[7])};
}

// Columns of a row that a thread holds: vectors threadIdx.x and threadIdx.x + blockDim.x of 8, as
// far as there are so many.
using Columns = float[kHeld][kVector];

__device__ __forceinline__ void add_vector(float (&added)[kVector], uint4 v) {
  float x[kVector];
  unpack8<DTYPE>(v, x);
#pragma unroll
  for (int e = 0; e < kVector; ++e) added[e] = add_rn(added[e], x[e]);
}

// Row blockIdx.x of an RMS norm. What is made here is what the kernel before does not write: few
// rows take as long as the instructions of one, from when that kernel ends.
struct NormRow {
  const int vectors = 0;
  const int64_t offset;  // of this thread's first vector
  const float columns;
  const Codes codes;
  uint4 weights[kHeld];

  __device__ __forceinline__ NormRow(const uint4* weight, int64_t k, int8_t* a8,
                                     int64_t rows_padded)
      : vectors(int(k / kVector)),
        offset(opaque(blockIdx.x * int64_t(vectors) + threadIdx.x)),
        columns(opaque(int_to_float(int(k)))),
        codes(a8, blockIdx.x, rows_padded, threadIdx.x) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      weights[j] = holds(j) ? weight[threadIdx.x + j * blockDim.x] : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ __forceinline__ bool holds(int j) const {
    return threadIdx.x + j * blockDim.x < vectors;
  }
  // Vector j of an addend, which there may not be.
  __device__ __forceinline__ uint4 load(const uint4* x, int j) const {
    return load8_if(x != nullptr & holds(j), x + offset + j * blockDim.x);
  }
  __device__ __forceinline__ void store(uint4* y, const uint4 (&v)[kHeld]) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (holds(j)) y[offset + j * blockDim.x] = v[j];
    }
  }

  // The norm of `added`, zeros beyond the last column, and its codes; stored in sum, and the norm
  // in y, unless nullptr.
  __device__ __forceinline__ void finish(Columns& added, float epsilon, float* token_scale,
                                         uint4* y, uint4* sum) const {
    uint4 held[kHeld];
    if (sum != nullptr) {
#pragma unroll
      for (int j = 0; j < kHeld; ++j) held[j] = pack8(added[j]);
      store(sum, held);
    }
    float squares = 0.0f;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
#pragma unroll
      for (int e = 0; e < kVector; ++e) squares = add_rn(squares, mul_rn(added[j][e], added[j][e]));
    }
    const float mean = div_rn(block_sum(squares), columns);
    const float inverse = div_rn(1.0f, sqrt_rn(add_rn(mean, epsilon)));
    Largest largest;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      float w[kVector];
      unpack8<DTYPE>(weights[j], w);
#pragma unroll
      for (int e = 0; e < kVector; ++e) added[j][e] = mul_rn(mul_rn(added[j][e], inverse), w[e]);
      held[j] = pack8(added[j]);
      if (holds(j)) largest.add(held[j]);
    }
    const float amax = largest.of_block(), inverse_scale = inverse_scale_of(amax);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (holds(j)) codes.store(j, held[j], inverse_scale);
    }
    if (y != nullptr) store(y, held);
    if (threadIdx.x == 0) token_scale[blockIdx.x] = token_scale_of(amax);
  }
};
