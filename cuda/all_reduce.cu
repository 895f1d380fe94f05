// Sum over tensor-parallel ranks, RMS norm and quantization in one kernel, one block a row (token):
//
//   all_reduce_norm_quantize   sum of the ranks' partial -> reduced; x0 + x1 + reduced -> sum, its
//                              RMS norm -> y, and y -> a8, token_scale (activation.cu)
//
// Contract: reduced is the ranks' sum in their order, in float32, rounded to DTYPE once, the same
// bits on all of them; the rest is bit-identical to norm_quantize of x0, x1 and reduced. k a
// multiple of 8, up to 8 * row_vectors. Launch: <<<rows, THREADS>>>, those of norm_quantize, on
// every rank for the same rows, which are no more than multiprocessors: a block waits for those of
// the other ranks, so that all must run at once. x0, x1, y and sum may be nullptr, x1 if x0 is,
// too.
//
// Each rank has an inbox in its own memory, which the others write to over NVLink:
//
//   inbox    [turn 2][rank that sends][row kMaxRows][row_vectors of 16 bytes]
//   turns    [row kMaxRows]  which half of the inbox the next sum of this row goes through
//
// Data are their own signal: what has not arrived is kUnsent, four times in 16 bytes, a pair of
// NaNs that no sum depends on and that is sent as another pair of NaNs. Whoever has read a vector
// makes it kUnsent again. A rank sends to the same place two sums later: by then it has what the
// reader sent for the sum between, after the kernel that cleared this one had ended.
#include "common.cuh"
#include "hopper.cuh"
#include "rows.cuh"

constexpr uint32_t kUnsent = 0xffffffff, kOtherNaNs = 0x7fff7fff;
constexpr int kMaxRows = 128, kMaxRanks = 8;

__device__ __forceinline__ void send(uint4* to, uint4 v) {
  uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) w[i] = w[i] == kUnsent ? kOtherNaNs : w[i];
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w[0]),
               "r"(w[1]), "r"(w[2]), "r"(w[3])
               : "memory");
}
__device__ __forceinline__ uint4 look(const uint4* at) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ __forceinline__ bool arrived(uint4 v) {
  return v.x != kUnsent && v.y != kUnsent && v.z != kUnsent && v.w != kUnsent;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    all_reduce_norm_quantize(const uint4* x0, const uint4* x1, const uint4* partial,
                             uint4* const* inboxes, uint32_t* turns, int rank, int ranks,
                             int64_t row_vectors, const uint4* weight, float epsilon, int8_t* a8,
                             float* token_scale, uint4* y, uint4* sum, uint4* reduced, int64_t k,
                             int64_t rows_padded) {
  __shared__ uint4* inbox_of[kMaxRanks];
  const int vectors = int(k / kVector), row = blockIdx.x;
  uint4 weights[kHeld];
  let_next_kernel_start();
  load_weights(weights, weight, vectors);  // the kernel before writes neither these
  if (threadIdx.x < ranks) inbox_of[threadIdx.x] = inboxes[threadIdx.x];  // nor these
  __syncthreads();
  wait_for_previous_kernel();
  const uint32_t turn = turns[row];
  const auto place = [&](int sender) {
    return ((int64_t(turn) * ranks + sender) * kMaxRows + row) * row_vectors;
  };
  const int64_t first = row * int64_t(vectors);
  uint4 own[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = threadIdx.x + j * blockDim.x;
    own[j] = i < vectors ? partial[first + i] : make_uint4(0, 0, 0, 0);
  }
  for (int to = 1; to < ranks; ++to) {  // not all to the same one
    uint4* const theirs = inbox_of[(rank + to) % ranks] + place(rank);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int i = threadIdx.x + j * blockDim.x;
      if (i < vectors) send(theirs + i, own[j]);
    }
  }
  clear_flags(a8, rows_padded, k);
  Columns added = {};
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {  // while the others' are on their way
    const int i = threadIdx.x + j * blockDim.x;
    if (i >= vectors) continue;
    if (x0 != nullptr) unpack8<DTYPE>(x0[first + i], added[j]);
    if (x1 != nullptr) add_vector(added[j], x1[first + i]);
  }
  Columns total;
  for (int sender = 0; sender < ranks; ++sender) {
    uint4 v[kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) v[j] = own[j];
    if (sender != rank) {
      uint4* const from = inbox_of[rank] + place(sender);
      bool complete;
      do {
        complete = true;
#pragma unroll
        for (int j = 0; j < kHeld; ++j) {
          const int i = threadIdx.x + j * blockDim.x;
          if (i >= vectors) continue;
          v[j] = look(from + i);
          complete = complete && arrived(v[j]);
        }
      } while (!complete);
#pragma unroll
      for (int j = 0; j < kHeld; ++j) {
        const int i = threadIdx.x + j * blockDim.x;
        if (i < vectors) from[i] = make_uint4(kUnsent, kUnsent, kUnsent, kUnsent);
      }
    }
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (sender == 0) unpack8<DTYPE>(v[j], total[j]);
      if (sender > 0) add_vector(total[j], v[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int i = threadIdx.x + j * blockDim.x;
    const uint4 rounded = pack8(total[j]);
    if (x0 == nullptr) unpack8<DTYPE>(rounded, added[j]);
    if (x0 != nullptr) add_vector(added[j], rounded);
    if (i < vectors) reduced[first + i] = rounded;
  }
  norm_and_quantize(added, weights, epsilon, a8, token_scale, y, sum, k, rows_padded);
  if (threadIdx.x == 0) turns[row] = turn ^ 1;  // which all have read: there are barriers between
}
