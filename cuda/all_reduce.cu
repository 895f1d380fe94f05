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

// To and from memory that another GPU reads or writes.
__device__ __forceinline__ void store_system(uint4* to, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_system(const uint4* at) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(at)
               : "memory");
  return v;
}
__device__ __forceinline__ void make_unsent(uint4* at) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %1, %1, %1};" ::"l"(at), "r"(kUnsent)
               : "memory");
}

__device__ __forceinline__ uint32_t sendable(uint32_t pair) {
  return pair == kUnsent ? kOtherNaNs : pair;
}
__device__ __forceinline__ void send(uint4* to, uint4 v) {
  store_system(to, {sendable(v.x), sendable(v.y), sendable(v.z), sendable(v.w)});
}
__device__ __forceinline__ bool arrived(uint4 v) {
  return v.x != kUnsent && v.y != kUnsent && v.z != kUnsent && v.w != kUnsent;
}

constexpr bool kManyRegisters = THREADS <= 512;  // a thread has

// What all ranks have of these columns, added up and rounded. place: where in the inbox a sender's
// row begins.
template <typename Place>
__device__ __forceinline__ void sum_over_ranks(uint4 (&sum)[kHeld], const uint4 (&own)[kHeld],
                                               uint4* inbox, Place place, int rank, int ranks,
                                               int vectors) {
  constexpr int kTogether = kManyRegisters ? kHeld : 1;
#pragma unroll
  for (int j0 = 0; j0 < kHeld; j0 += kTogether) {
    const int i0 = threadIdx.x + j0 * blockDim.x;
    float total[kTogether][kVector];
    for (int sender = 0; sender < ranks; ++sender) {
      uint4 v[kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) v[j] = own[j0 + j];
      if (sender != rank) {
        uint4* const from = inbox + place(sender) + i0;
        bool complete;
        do {
          complete = true;
#pragma unroll
          for (int j = 0; j < kTogether; ++j) {
            if (i0 + j * blockDim.x >= vectors) continue;
            v[j] = load_system(from + j * blockDim.x);
            complete = complete && arrived(v[j]);
          }
        } while (!complete);
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (i0 + j * blockDim.x >= vectors) continue;
          make_unsent(from + j * blockDim.x);
        }
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (sender == 0) unpack8<DTYPE>(v[j], total[j]);
        if (sender > 0) add_vector(total[j], v[j]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) sum[j0 + j] = pack8(total[j]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    all_reduce_norm_quantize(const uint4* x0, const uint4* x1, const uint4* partial,
                             uint4* const* inboxes, uint32_t* turns, int rank, int ranks,
                             int64_t row_vectors, const uint4* weight, float epsilon, int8_t* a8,
                             float* token_scale, uint4* y, uint4* sum, uint4* reduced, int64_t k,
                             int64_t rows_padded) {
  __shared__ uint4* inbox_of[kMaxRanks];
  const int row = blockIdx.x;
  let_next_kernel_start();
  const NormRow norm(weight, k, a8, rows_padded);
  if (threadIdx.x < ranks) inbox_of[threadIdx.x] = inboxes[threadIdx.x];
  __syncthreads();
  wait_for_previous_kernel();
  const uint32_t turn = turns[row];
  const auto place = [&](int sender) {
    return ((int64_t(turn) * ranks + sender) * kMaxRows + row) * row_vectors;
  };
  uint4 own[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) own[j] = norm.load(partial, j);
  for (int to = 1; to < ranks; ++to) {  // not all to the same one
    const int other = rank + to < ranks ? rank + to : rank + to - ranks;
    uint4* const theirs = inbox_of[other] + place(rank);
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      if (norm.holds(j)) send(theirs + threadIdx.x + j * blockDim.x, own[j]);
    }
  }
  clear_flags(a8, rows_padded, k);
  Columns added;
  const auto add_others = [&] {
    uint4 others[2][kHeld];
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      others[0][j] = norm.load(x0, j);
      others[1][j] = norm.load(x1, j);
    }
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      unpack8<DTYPE>(others[0][j], added[j]);
      add_vector(added[j], others[1][j]);
    }
  };
  if (kManyRegisters) add_others();  // while those of the ranks are on their way
  uint4 total[kHeld];
  sum_over_ranks(total, own, inbox_of[rank], place, rank, ranks, norm.vectors);
  if (!kManyRegisters) add_others();
#pragma unroll
  for (int j = 0; j < kHeld; ++j) add_vector(added[j], total[j]);
  norm.store(reduced, total);
  norm.finish(added, epsilon, token_scale, y, sum);
  clear_padding(a8, row, rows_padded, int(k));
  if (threadIdx.x == 0) turns[row] = turn ^ 1;  // which all have read: there are barriers between
}
