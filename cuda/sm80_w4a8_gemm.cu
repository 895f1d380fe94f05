// W4A8 GEMM with integer group scales on mma.sync, for sm_80 and every newer architecture.
//
//   out[m, n] = float(sum_g S[n, g] * sum_{k in g} a8[m, k] * w4[n, k])
//               * channel_scale[n] * token_scale[m] + bias[n]
//
// Contract (bit-identical to reference.gemm; "accumulate" form: the group scale multiplies the
// int32 partial sum of its group)
//   a8           int8, the layout of common.cuh; k a multiple of 32
//   token_scale  float32 [rows]
//   qweight      int4 tiles [ceil(n / 16)][ceil(k / 64)][32 lanes][16 bytes], see below
//   group_scale  int16 [ceil(k / GROUP)][n rounded up to 16]
//   channel_scale float32 [n];  bias DTYPE [n] or nullptr
//   out          DTYPE [m, n]; with -DDTYPE=INT32 the accumulators
//   grid (ceil(m / TILE_M), ceil(n / TILE_N)), block 32 * WARPS_N * WARPS_M * WARPS_K
// With -DGROUPED=1 a tile of tokens is one tile of `moe_routing.cu`: rows are gathered from
// row slot / slots_per_row of a8, written to out[slot], and each tensor has a leading expert
// dimension.
//
// Weights are the A operand (16 output channels x 32 k), tokens the B operand (8 tokens), so few
// tokens waste little. The 16 bytes of a lane hold its A fragments of two k-steps:
//
//            byte 0..3: k + 4 t + 0..3                 lane = 4 * row + t
//   word 0   low nibble: channel row, high nibble: channel row + 8,     k-step 0, k +  0
//   word 1   the same                                                   k-step 0, k + 16
//   word 2, word 3                                                      k-step 1, k + 32, k + 48
//
// A nibble is two's complement. Kept in the upper half of its byte it is 16 * w as int8, which
// costs a shift and a mask less per word than sign extension; the partial sum of a group is then
// 16 times too large (at most 128 * 8 * 127 * 16 < 2^21) and an exact shift puts it right.
//
// A block computes TILE_N channels x TILE_M tokens. Its warps split channels (WARPS_N), tokens
// (WARPS_M) and k (WARPS_K: each takes every WARPS_K-th slice of 128 k; integer sums may be
// split freely). A stage of shared memory holds 128 * WARPS_K of k:
//
//   weights  [WARPS_K slices][TILE_N / 16][2][32 lanes][16 B]
//   tokens   [WARPS_K slices][TILE_M][128 B], 16-byte chunk c of row r at chunk c ^ (r % 8)
//   scales   [WARPS_K slices][128 / GROUP][TILE_N] int16
#include "common.cuh"

constexpr int kWarps = WARPS_N * WARPS_M * WARPS_K;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlice = 128;                       // k of one warp and stage
constexpr int kStage = kSlice * WARPS_K;          // k of one stage
constexpr int kRowTiles = TILE_N / WARPS_N / 16;  // of one warp, 16 channels each
constexpr int kTokenTiles = TILE_M / WARPS_M / 8;
constexpr int kGroups = kSlice / GROUP;  // of one slice

constexpr int kWeightBytes = TILE_N * kStage / 2;
constexpr int kTokenBytes = TILE_M * kStage;
constexpr int kScaleBytes = kStage / GROUP * TILE_N * 2;
constexpr int kStageBytes = kWeightBytes + kTokenBytes + kScaleBytes;
constexpr int kOutPitch = TILE_N + 4;  // ints; conflict-free for the fragment's 8 x 4 lanes

struct Fragments {  // int32 accumulators of a warp's tile
  int v[kRowTiles][kTokenTiles][4];
};

// Shared memory of one stage <- k from `k0`. Everything past n, k or the last row becomes zero.
__device__ __forceinline__ void load_stage(uint32_t stage, int k0, const int8_t* a8,
                                           int64_t rows_padded, const int* source_row,
                                           const uint4* qweight, const int16_t* group_scale, int n0,
                                           int n, int k) {
  const int row_tiles = (n + 15) / 16, k_tiles = (k + 63) / 64, groups = (k + GROUP - 1) / GROUP;
#pragma unroll
  for (int i = threadIdx.x; i < kWeightBytes / 16; i += kThreads) {
    const int lane = i % 32, half = i / 32 % 2, tile = i / 64 % (TILE_N / 16);
    const int slice = i / 64 / (TILE_N / 16);
    const int row_tile = n0 / 16 + tile, k_tile = (k0 + slice * kSlice) / 64 + half;
    const bool valid = row_tile < row_tiles && k_tile < k_tiles;
    copy16(stage + i * 16, qweight + (valid ? (row_tile * k_tiles + k_tile) * 32 + lane : 0),
           valid);
  }
  const uint32_t tokens = stage + kWeightBytes;
#pragma unroll
  for (int i = threadIdx.x; i < kTokenBytes / 16; i += kThreads) {
    const int chunk = i % 8, row = i / 8 % TILE_M, slice = i / 8 / TILE_M;
    const int column = k0 + slice * kSlice + chunk * 16, source = source_row[row];
    const bool valid = source >= 0 && column < k;
    copy16(tokens + ((slice * TILE_M + row) * 8 + (chunk ^ (row % 8))) * 16,
           a8 + (valid ? activation_chunk(source, rows_padded, column) : 0), valid);
  }
  const uint32_t scales = tokens + kTokenBytes;
#pragma unroll
  for (int i = threadIdx.x; i < kScaleBytes / 16; i += kThreads) {
    const int column = n0 + i % (TILE_N / 8) * 8, group = k0 / GROUP + i / (TILE_N / 8);
    const bool valid = group < groups && column < row_tiles * 16;
    copy16(scales + i * 16, group_scale + (valid ? group * row_tiles * 16 + column : 0), valid);
  }
}

// acc += S * partial / 16 over one row tile, for the group that just ended.
__device__ __forceinline__ void add_group(int (&acc)[kTokenTiles][4],
                                          const int (&partial)[kTokenTiles][4],
                                          const int16_t* scales) {
  const int low = scales[0], high = scales[8];
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[t][i] += (i < 2 ? low : high) * (partial[t][i] >> 4);
  }
}

// One warp's slice of one stage.
__device__ __forceinline__ void multiply_slice(Fragments& acc, Fragments& partial,
                                               const uint8_t* stage, int slice, int warp_n,
                                               int warp_m) {
  const int lane = threadIdx.x % 32;
  const uint8_t* weights = stage + (slice * (TILE_N / 16) + warp_n * kRowTiles) * 1024 + lane * 16;
  const uint32_t tokens = shared_address(stage) + kWeightBytes +
                          (slice * TILE_M + warp_m * kTokenTiles * 8 + lane % 8) * 128;
  const int16_t* scales = reinterpret_cast<const int16_t*>(stage + kWeightBytes + kTokenBytes) +
                          slice * kGroups * TILE_N + warp_n * kRowTiles * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 64 of k: one 16-byte load per weight fragment
    uint32_t b[kTokenTiles][4];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {  // lane / 8 picks the 16-byte chunk, lane % 8 the row
      load_matrix_x4(b[t], tokens + t * 1024 + ((half * 4 + lane / 8) ^ (lane % 8)) * 16);
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint4 v = *reinterpret_cast<const uint4*>(weights + (r * 2 + half) * 512);
      const uint32_t w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int k = half * 64 + step * 32;
        const uint32_t w0 = w[step * 2], w1 = w[step * 2 + 1];
        const uint32_t a[4] = {(w0 << 4) & 0xf0f0f0f0, w0 & 0xf0f0f0f0, (w1 << 4) & 0xf0f0f0f0,
                               w1 & 0xf0f0f0f0};
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          int (&p)[4] = partial.v[r][t];
          if (k % GROUP == 0) {
            mma_s8(p, a, b[t][step * 2], b[t][step * 2 + 1], 0, 0, 0, 0);
          } else {
            mma_s8(p, a, b[t][step * 2], b[t][step * 2 + 1], p[0], p[1], p[2], p[3]);
          }
        }
        if ((k + 32) % GROUP == 0) {
          add_group(acc.v[r], partial.v[r], scales + k / GROUP * TILE_N + r * 16);
        }
      }
    }
  }
}

// Sums the WARPS_K partial tiles into `tile` int [TILE_M][kOutPitch], one k-slice at a time.
__device__ __forceinline__ void reduce_warps(int* tile, const Fragments& acc, int warp_n,
                                             int warp_m, int warp_k) {
  const int lane = threadIdx.x % 32;
  for (int turn = 0; turn < WARPS_K; ++turn) {
    if (turn == warp_k) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = (warp_m * kTokenTiles + t) * 8 + lane % 4 * 2 + i % 2;
            const int column = (warp_n * kRowTiles + r) * 16 + lane / 4 + i / 2 * 8;
            int* cell = tile + row * kOutPitch + column;
            *cell = turn == 0 ? acc.v[r][t][i] : *cell + acc.v[r][t][i];
          }
        }
      }
    }
    __syncthreads();  // one warp's sum is complete
  }
}

#if DTYPE == INT32
using Out = int;
#else
using Out = uint16_t;
#endif
struct alignas(4 * sizeof(Out)) Vector {
  Out v[4];
};

__device__ __forceinline__ Out scale_output(int acc, float channel_scale, float token_scale,
                                            const uint16_t* bias) {
#if DTYPE == INT32
  return acc;
#else
  float y = mul_rn(mul_rn(int_to_float(acc), channel_scale), token_scale);
  if (bias != nullptr) y = add_rn(y, to_float<DTYPE>(*bias));
  return from_float<DTYPE>(y);
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    w4a8_gemm(const int8_t* a8, const float* token_scale, const uint4* qweight,
              const int16_t* group_scale, const float* channel_scale, const uint16_t* bias,
              Out* out, int m, int rows_padded, int n, int k, const int* sorted_slots,
              const int* tile_expert, const int* tile_count, int slots_per_row) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ int source_row[TILE_M];  // row of a8, -1: none
  __shared__ int output_row[TILE_M];
  const int n0 = blockIdx.y * TILE_N;
#if GROUPED
  if (int(blockIdx.x) >= *tile_count) return;
  const int64_t expert = tile_expert[blockIdx.x];
  const int row_tiles = (n + 15) / 16;
  qweight += expert * (row_tiles * ((k + 63) / 64) * 32);
  group_scale += expert * ((k + GROUP - 1) / GROUP * row_tiles * 16);
  channel_scale += expert * n;
#endif
  for (int i = threadIdx.x; i < TILE_M; i += kThreads) {
    const int row = blockIdx.x * TILE_M + i;
#if GROUPED
    const int slot = sorted_slots[row];
    source_row[i] = slot < 0 ? -1 : slot / slots_per_row;
    output_row[i] = slot;
#else
    source_row[i] = output_row[i] = row < m ? row : -1;
#endif
  }
  __syncthreads();

  const int warp = threadIdx.x / 32;
  const int warp_n = warp % WARPS_N, warp_m = warp / WARPS_N % WARPS_M;
  const int warp_k = warp / (WARPS_N * WARPS_M);
  const int stages = (k + kStage - 1) / kStage;
  Fragments acc = {}, partial;

  const uint32_t base = shared_address(shared);
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < stages) {
      load_stage(base + s * kStageBytes, s * kStage, a8, rows_padded, source_row, qweight,
                 group_scale, n0, n, k);
    }
    commit_copies();
  }
  for (int s = 0; s < stages; ++s) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // stage s has arrived for all, and stage s - 1 is free for all
    const int ahead = s + STAGES - 1;
    if (ahead < stages) {
      load_stage(base + ahead % STAGES * kStageBytes, ahead * kStage, a8, rows_padded, source_row,
                 qweight, group_scale, n0, n, k);
    }
    commit_copies();
    multiply_slice(acc, partial, shared + s % STAGES * kStageBytes, warp_k, warp_n, warp_m);
  }
  wait_copies<0>();
  __syncthreads();

  int* tile = reinterpret_cast<int*>(shared);
  reduce_warps(tile, acc, warp_n, warp_m, warp_k);
  for (int i = threadIdx.x; i < TILE_M * (TILE_N / 4); i += kThreads) {
    const int row = i / (TILE_N / 4), column = i % (TILE_N / 4) * 4;
    const int target = output_row[row];
    if (target < 0) continue;
    const float scale = DTYPE == INT32 ? 0.0f : token_scale[source_row[row]];
    Vector y = {};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int channel = n0 + column + j;
      if (channel < n) {
        y.v[j] = scale_output(tile[row * kOutPitch + column + j], channel_scale[channel], scale,
                              bias == nullptr ? nullptr : bias + channel);
      }
    }
    Out* target_out = out + int64_t(target) * n + n0 + column;
    if (n % 4 == 0) {  // then rows are aligned and a vector is all in or all out
      if (n0 + column < n) *reinterpret_cast<Vector*>(target_out) = y;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (n0 + column + j < n) target_out[j] = y.v[j];
      }
    }
  }
}
