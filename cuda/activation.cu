// Row-wise work on activations, one block a row (token or expert slot), 16-bit floats in:
//
//   quantize_activation   x [rows, k] -> a8 int8 (layout: common.cuh), token_scale float32 [rows]
//   quantize_slots        x [tokens, k] -> the same, a token's row at slot_row of all its slots
//   norm_quantize         x0 + x1 + x2 -> sum, its RMS norm -> y, and the same of y
//   silu_mul_quantize     gate_up [rows, 2k] -> the same, of silu(gate) * up rounded to DTYPE
//   weighted_sum          y [rows, n] -> out [tokens, n], slots added in order
//   rotary_embedding      qkv [tokens, ...] -> q, k [tokens, heads * head_size], rotated
//
// Contract: bit-identical to reference.{quantize_activation, rms_norm, silu_mul, moe,
// rotary_embedding}. k and n are multiples of 8, head_size is one of 16, rows are 16-byte aligned;
// row strides are in elements. Launch: <<<rows, threads>>>, whole warps, up to kMaxThreads
// (rotary_embedding: a thread for each 16 columns); silu_mul_quantize needs 2 * k bytes of dynamic
// shared memory. norm_quantize: rows without gaps, k up to 16 * kMaxThreads, threads as
// reference.norm_threads; x2, or x1 and x2, and each of y and sum may be nullptr.
// slot_row int [tokens * topk]: moe_routing.cu. Slots at -1 have no row; a block of
// silu_mul_quantize is a slot (a row, if slot_row is nullptr), and the first one clears the flags.
// On Hopper a slot can be a cluster of 1, 2, 4 or 8 blocks there: each does a part of the row, and
// they exchange its maximum. Launches overlap (moe_routing.cu): quantize_slots reads x,
// silu_mul_quantize slot_row, norm_quantize weight, and rotary_embedding positions and their
// cos_sin, before the kernel in front of them ends.
#include "common.cuh"
#include "hopper.cuh"
#include "rows.cuh"

constexpr int kSiluThreads = 256;

// Blocks that share a row: those of a cluster, which there are from Hopper on.
#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int blocks_of_row() { return cluster_size(); }
__device__ __forceinline__ int block_of_row() { return cluster_rank(); }

// Maximum over the blocks of a row: each warp sends its own to all of them, whose barrier counts
// the bytes. A release to the cluster would wait for all that this block has stored anywhere.
struct RowMax {
  static constexpr int kWarps = kSiluThreads / 32, kMost = 8 * kWarps;  // of a portable cluster
  uint32_t* of_warps;
  uint32_t arrived;

  // Before the kernel does anything else: nobody may write to a block that does not run yet.
  __device__ __forceinline__ RowMax() {
    __shared__ uint32_t all[kMost];
    __shared__ uint64_t barrier;
    of_warps = all, arrived = shared_address(&barrier);
    if (blocks_of_row() == 1) return;
    if (threadIdx.x == 0) {
      barrier_init(arrived, 1);
      barrier_init_fence();
      barrier_expect(arrived, blocks_of_row() * kWarps * sizeof(uint32_t));
    }
    __syncwarp();
    cluster_arrive();
    cluster_wait();
  }
  __device__ __forceinline__ uint32_t operator()(uint32_t value) const {
    const int blocks = blocks_of_row(), lane = threadIdx.x % 32;
    if (blocks == 1) return block_max(value);
    value = __reduce_max_sync(0xffffffff, value);
    uint32_t* const own = of_warps + block_of_row() * kWarps + threadIdx.x / 32;
    if (lane < blocks) store_remote(shared_address(own), arrived, lane, value);
    barrier_wait(arrived, 0);
#pragma unroll
    for (int i = lane; i < kMost; i += 32) {
      if (i < blocks * kWarps) value = max(value, of_warps[i]);
    }
    return __reduce_max_sync(0xffffffff, value);
  }
};
#else
__device__ __forceinline__ int blocks_of_row() { return 1; }
__device__ __forceinline__ int block_of_row() { return 0; }
struct RowMax {
  __device__ __forceinline__ uint32_t operator()(uint32_t value) const { return block_max(value); }
};
#endif

__device__ __forceinline__ int log2_blocks_of_row() { return __popc(blocks_of_row() - 1); }

// Row blockIdx.x of x, as much of it as registers hold, and its scale.
struct Row {
  const uint4* in;
  int vectors;
  uint4 held[kHeld];
  float amax, inverse;

  __device__ __forceinline__ Row(const uint16_t* x, int64_t k, int64_t row_stride)
      : in(reinterpret_cast<const uint4*>(x + blockIdx.x * row_stride)), vectors(int(k / kVector)) {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int i = threadIdx.x + j * blockDim.x;
      held[j] = load8_if(i < vectors, in + i);
    }
    Largest largest;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) largest.add(held[j]);
    for (int i = first_not_held(); i < vectors; i += blockDim.x) largest.add(in[i]);
    amax = largest.of_block(), inverse = inverse_scale_of(amax);
  }
  __device__ __forceinline__ int first_not_held() const { return threadIdx.x + kHeld * blockDim.x; }
  __device__ __forceinline__ void store(const Codes& codes, float* token_scale, int64_t row) const {
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (threadIdx.x + j * blockDim.x < vectors) codes.store(j, held[j], inverse);
    }
    int j = kHeld;
    for (int i = first_not_held(); i < vectors; i += blockDim.x) codes.store(j++, in[i], inverse);
    if (threadIdx.x == 0) token_scale[row] = token_scale_of(amax);
  }
};

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    quantize_activation(const uint16_t* x, int8_t* a8, float* token_scale, int64_t k,
                        int64_t row_stride, int64_t rows_padded) {
  let_next_kernel_start();
  const Codes codes(a8, blockIdx.x, rows_padded, threadIdx.x);
  wait_for_previous_kernel();
  const Row row(x, k, row_stride);
  row.store(codes, token_scale, blockIdx.x);
  clear_padding(a8, blockIdx.x, rows_padded, int(k));
  clear_flags(a8, rows_padded, k);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    quantize_slots(const uint16_t* x, const int* slot_row, int8_t* a8, float* token_scale,
                   int64_t k, int64_t row_stride, int64_t rows_padded, int topk) {
  const Row token(x, k, row_stride);
  wait_for_previous_kernel();
  let_next_kernel_start();
  clear_flags(a8, rows_padded, k);
  for (int slot = 0; slot < topk; ++slot) {
    const int row = slot_row[blockIdx.x * int64_t(topk) + slot];
    if (row < 0) continue;
    token.store(Codes(a8, row, rows_padded, threadIdx.x), token_scale, row);
    clear_padding(a8, row, rows_padded, int(k));
  }
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    norm_quantize(const uint4* x0, const uint4* x1, const uint4* x2, const uint4* weight,
                  float epsilon, int8_t* a8, float* token_scale, uint4* y, uint4* sum, int64_t k,
                  int64_t rows_padded) {
  let_next_kernel_start();
  const NormRow row(weight, k, a8, rows_padded);
  wait_for_previous_kernel();
  uint4 addends[3][kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    addends[0][j] = row.load(x0, j);
    addends[1][j] = row.load(x1, j);
    addends[2][j] = row.load(x2, j);
  }
  Columns added;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    unpack8<DTYPE>(addends[0][j], added[j]);
    add_vector(added[j], addends[1][j]);
    add_vector(added[j], addends[2][j]);
  }
  row.finish(added, epsilon, token_scale, y, sum);
  clear_padding(a8, blockIdx.x, rows_padded, int(k));
  clear_flags(a8, rows_padded, k);
}

// silu(gate) * up of eight columns, rounded once.
__device__ __forceinline__ uint4 silu_mul(uint4 gates, uint4 ups) {
  float gate[kVector], up[kVector];
  unpack8<DTYPE>(gates, gate);
  unpack8<DTYPE>(ups, up);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float exp = exp2_reference(mul_rn(gate[j], -1.4426950408889634f));
    gate[j] = mul_rn(mul_rn(gate[j], reciprocal_reference(add_rn(1.0f, exp))), up[j]);
  }
  return pack8(gate);
}

extern "C" __global__ void __launch_bounds__(kSiluThreads, 8)
    silu_mul_quantize(const uint16_t* gate_up, const int* slot_row, int8_t* a8, float* token_scale,
                      int64_t k, int64_t rows_padded) {
  extern __shared__ uint4 hidden[];  // this block's part of silu(gate) * up, rounded
  let_next_kernel_start();
  const RowMax row_max;
  int64_t row = blockIdx.x >> log2_blocks_of_row();
  if (slot_row != nullptr) row = __ldcg(slot_row + row);
  const int vectors = row < 0 ? 0 : int(k / kVector);  // what has no row goes along
  const int part = (vectors + blocks_of_row() - 1) >> log2_blocks_of_row();
  const int begin = min(part * block_of_row(), vectors), end = min(begin + part, vectors);
  const uint4* const gates = reinterpret_cast<const uint4*>(gate_up + row * 2 * k);
  const Codes codes(a8, row, rows_padded, begin + threadIdx.x);
  wait_for_previous_kernel();
  Largest largest;
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const uint4 gate = load8_if(true, gates + i), up = load8_if(true, gates + i + vectors);
    const uint4 v = silu_mul(gate, up);
    hidden[i - begin] = v;
    largest.add(v);
  }
  const float amax = Largest::float_of(row_max(largest.bits())), inverse = inverse_scale_of(amax);
  int j = 0;
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) {  // its own: no barrier
    codes.store(j++, hidden[i - begin], inverse);
  }
  clear_flags(a8, rows_padded, k);
  if (row < 0 || block_of_row() > 0) return;
  clear_padding(a8, row, rows_padded, int(k));
  if (threadIdx.x == 0) token_scale[row] = token_scale_of(amax);
}

extern "C" __global__ void __launch_bounds__(kMaxThreads)
    weighted_sum(const uint16_t* y, const float* topk_weights, const int* slot_row, uint16_t* out,
                 int64_t n, int64_t topk) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t token = blockIdx.x;
  for (int64_t i = threadIdx.x; i < n / kVector; i += blockDim.x) {
    float sum[kVector] = {};
    for (int64_t slot = token * topk; slot < (token + 1) * topk; ++slot) {
      const int64_t row = slot_row[slot];
      if (row < 0) continue;
      float value[kVector];
      unpack8<DTYPE>(reinterpret_cast<const uint4*>(y + row * n)[i], value);
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        sum[j] = add_rn(sum[j], mul_rn(topk_weights[slot], value[j]));
      }
    }
    reinterpret_cast<uint4*>(out + token * n)[i] = pack8(sum);
  }
}

// A head's columns i and i + half are a pair, rotated by the angle of its row of cos_sin
// [positions, half cosines, half sines]. A thread has eight pairs. qkv begins with q, then k.
extern "C" __global__ void __launch_bounds__(kMaxThreads)
    rotary_embedding(const uint16_t* qkv, const int64_t* positions, const uint16_t* cos_sin,
                     uint16_t* q, uint16_t* k, int tokens, int q_heads, int k_heads, int half,
                     int64_t row_stride) {
  let_next_kernel_start();
  const int vectors = half / kVector, heads = q_heads + k_heads;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t token = i / (heads * vectors);
  const int head = i / vectors % heads, column = i % vectors * kVector;
  if (token >= tokens) return;
  const uint16_t* angle = cos_sin + positions[token] * 2 * half + column;
  float cos[kVector], sin[kVector], first[kVector], second[kVector];
  unpack8<DTYPE>(*reinterpret_cast<const uint4*>(angle), cos);
  unpack8<DTYPE>(*reinterpret_cast<const uint4*>(angle + half), sin);
  wait_for_previous_kernel();
  const uint16_t* in = qkv + token * row_stride + head * 2 * half + column;
  unpack8<DTYPE>(*reinterpret_cast<const uint4*>(in), first);
  unpack8<DTYPE>(*reinterpret_cast<const uint4*>(in + half), second);
#pragma unroll
  for (int j = 0; j < kVector; ++j) {
    const float x = first[j], y = second[j];
    first[j] = sub_rn(mul_rn(x, cos[j]), mul_rn(y, sin[j]));
    second[j] = add_rn(mul_rn(y, cos[j]), mul_rn(x, sin[j]));
  }
  uint16_t* out = head < q_heads ? q + (token * q_heads + head) * 2 * half
                                 : k + (token * k_heads + head - q_heads) * 2 * half;
  *reinterpret_cast<uint4*>(out + column) = pack8(first);
  *reinterpret_cast<uint4*>(out + column + half) = pack8(second);
}
