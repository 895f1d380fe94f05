// W4A8 GEMM with integer group scales on mma.sync, for sm_80 and every newer architecture.
//
//   out[m, n] = float(sum_g S[n, g] * sum_{k in g} a8[m, k] * w4[n, k])
//               * channel_scale[n] * token_scale[m] + bias[n]
//
// Contract (bit-identical to reference.gemm; "accumulate" form: the group scale multiplies the
// int32 partial sum of its group). With BITS=8 w are int8 and S is 1: 8-bit layers, folded on the
// host (reference.fold)
//   a8           int8, the layout of common.cuh, k a multiple of 128 with its padding
//   token_scale  float32 [rows]
//   qweight      tiles [n / 16][k / 128][2 (BITS=8: 4)][32 lanes][16 bytes], see below
//   group_scale  int16 [k / GROUP][n] (BITS=8: not read);  both with n a multiple of 128, zeros
//                past that of the layer
//   channel_scale float32 [n];  bias DTYPE [n] or nullptr
//   out          DTYPE [m, n]; with -DDTYPE=INT32 the accumulators
//   partials     int32 [tiles][splits][TILE_M][TILE_N], scratch; nullptr for one split
//   grid (ceil(m / TILE_M), ceil(n / TILE_N), splits), block 32 * WARPS_N * WARPS_M * WARPS_K
// With -DGROUPED=1 a tile of tokens is one of `moe_routing.cu`, grid.x as many as there may be, and
// each tensor of the weight has a leading expert dimension. One split then.
//
// Weights are the A operand (16 output channels x 32 k), tokens the B operand (8 tokens), so few
// tokens waste little. The 16 bytes of a lane hold its A fragments of two k-steps:
//
//            byte 0..3: k + 4 t + 0..3                 lane = 4 * row + t
//   word 0   low nibble: channel row, high nibble: channel row + 8,     k-step 0, k +  0
//   word 1   the same                                                   k-step 0, k + 16
//   word 2, word 3                                                      k-step 1, k + 32, k + 48
//
// With BITS=8 they are those of one k-step: a word is four w of channel row, k + 0, of row + 8, of
// row, k + 16, and of row + 8.
//
// A nibble is two's complement. Kept in the upper half of its byte it is 16 * w as int8, which
// costs a shift and a mask less per word than sign extension; the partial sum of a group is then
// 16 times too large (at most 128 * 8 * 127 * 16 < 2^21) and an exact shift puts it right.
//
// A block computes TILE_N channels x TILE_M tokens. Its warps split channels (WARPS_N), tokens
// (WARPS_M) and k (WARPS_K: each takes every WARPS_K-th slice of 128 k; integer sums may be
// split freely). A stage of shared memory holds 128 * WARPS_K of k:
//
//   weights  [WARPS_K slices][TILE_N / 16][2 (BITS=8: 4)][32 lanes][16 B]
//   tokens   [WARPS_K slices][TILE_M][128 B], 16-byte chunk c of row r at chunk c ^ (r % 8)
//   scales   [WARPS_K slices][128 / GROUP][TILE_N] int16 (BITS=8: none)
//
// Where tiles are fewer than multiprocessors, `splits` blocks share a tile's k. Each leaves its
// sums in `partials`; the last one adds them up. The counters of those that are done are the flags
// behind the activations (common.cuh).
#include "common.cuh"

constexpr int kWarps = WARPS_N * WARPS_M * WARPS_K;
constexpr int kThreads = 32 * kWarps;
constexpr int kSlice = 128;                       // k of one warp and stage
constexpr int kRowTiles = TILE_N / WARPS_N / 16;  // of one warp, 16 channels each
constexpr int kTokenTiles = TILE_M / WARPS_M / 8;
constexpr int kGroups = BITS == 4 ? kSlice / GROUP : 0;  // of one slice, that have scales

// 16-byte chunks of a slice
constexpr int kRowTileBytes = 16 * kSlice * BITS / 8;
constexpr int kRowTileChunks = kRowTileBytes / 16;
constexpr int kWeightChunks = TILE_N / 16 * kRowTileChunks;
constexpr int kTokenChunks = TILE_M * kSlice / 16;
constexpr int kScaleChunks = kGroups * TILE_N * 2 / 16;
constexpr int kTokensAt = WARPS_K * kWeightChunks * 16;  // in a stage, bytes
constexpr int kScalesAt = kTokensAt + WARPS_K * kTokenChunks * 16;
constexpr int kStageBytes = kScalesAt + WARPS_K * kScaleChunks * 16;
constexpr int kOutPitch = TILE_N + 4;  // ints; conflict-free for the fragment's 8 x 4 lanes
constexpr int kVectors = TILE_N / 4;   // of a row of outputs
static_assert(kThreads % kVectors == 0, "a thread writes the same four channels of each row");

using Accumulators = int[kRowTiles][kTokenTiles][4];  // of a warp's tile

template <int chunks>  // of a slice: how many copies of a thread they are in a stage
constexpr int kCopies = (WARPS_K * chunks + kThreads - 1) / kThreads;
static_assert(kCopies<kScaleChunks> <= 1, "a thread copies at most one chunk of scales");

// Where a thread's chunks of the next stage come from.
struct Sources {
  const uint8_t *weights, *scales;        // of its first chunk
  const uint8_t* tokens;                  // of the stage's first k
  uint32_t token[kCopies<kTokenChunks>];  // bytes from there, one a copy
  int weight_slices, token_slices;        // blocks of 128 k from the stage's first to the last
};

// Calls copy(j, slice) for the chunks threadIdx.x + j * kThreads of a stage. `chunks` is a multiple
// of kThreads or the other way round.
template <int chunks, typename Copy>
__device__ __forceinline__ void for_own_chunks(Copy copy) {
#pragma unroll
  for (int j = 0; j < kCopies<chunks>; ++j) {
    const int i = threadIdx.x + j * kThreads;
    const int slice = j * kThreads / chunks + (kThreads > chunks ? threadIdx.x / chunks : 0);
    if (WARPS_K * chunks % kThreads == 0 || i < WARPS_K * chunks) copy(j, slice);
  }
}

struct TokenTile {
  int expert, m0, rows;
};
__device__ __forceinline__ TokenTile token_tile(const int4* tiles, int m) {
#if GROUPED
  const int4 own = tiles[blockIdx.x];
  return {own.x, own.y, own.z};
#else
  const int m0 = blockIdx.x * TILE_M;
  return {0, m0, min(TILE_M, m - m0)};
#endif
}

// Fills one stage of shared memory, and moves on to the next. What lies past the end becomes zeros.
__device__ __forceinline__ void load_weights(Sources& from, uint32_t stage, int k_blocks) {
  for_own_chunks<kWeightChunks>([&](int j, int slice) {
    const int at = j * kThreads;
    const int tile = at % kWeightChunks / kRowTileChunks, own_slice = at / kWeightChunks;
    const int chunk = at % kRowTileChunks;  // 0 unless a row tile has more chunks than threads
    copy16(stage + (threadIdx.x + at) * 16,
           from.weights + (tile * k_blocks + own_slice) * kRowTileBytes + chunk * 16,
           WARPS_K == 1 || slice < from.weight_slices);
  });
  from.weights += WARPS_K * kRowTileBytes;
  from.weight_slices -= WARPS_K;
}
__device__ __forceinline__ void load_tokens(Sources& from, uint32_t stage, int rows_padded,
                                            int row_tiles) {
  const uint32_t chunk = threadIdx.x ^ (threadIdx.x / 8 % 8);  // see "tokens" above
  for_own_chunks<kTokenChunks>([&](int j, int slice) {
    copy16(stage + kTokensAt + (chunk + j * kThreads) * 16, from.tokens + from.token[j],
           WARPS_K == 1 || slice < from.token_slices);
  });
  if constexpr (kScaleChunks > 0) {
    for_own_chunks<kScaleChunks>([&](int, int slice) {
      copy16(stage + kScalesAt + threadIdx.x * 16, from.scales,
             WARPS_K == 1 || slice < from.token_slices);
    });
  }
  from.tokens += int64_t(rows_padded) * (WARPS_K * 128);
  from.scales += row_tiles * (WARPS_K * kGroups * 32);
  from.token_slices -= WARPS_K;
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

// The token operands of one warp's slice of one stage.
using Tokens = uint32_t[kTokenTiles][2][4];
__device__ __forceinline__ void load_operands(Tokens& b, uint32_t stage, int slice, int warp_m) {
  const int lane = threadIdx.x % 32;  // lane / 8 picks the 16-byte chunk, lane % 8 the row
  const uint32_t row =
      stage + kTokensAt + (slice * TILE_M + warp_m * kTokenTiles * 8 + lane % 8) * 128;
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
    load_matrix_x4(b[t][0], row + t * 1024 + ((lane / 8) ^ (lane % 8)) * 16);
    load_matrix_x4(b[t][1], row + t * 1024 + ((4 + lane / 8) ^ (lane % 8)) * 16);
  }
}

// Multiplies one warp's slice of one stage. A row tile at a time, so that few partial sums live.
__device__ __forceinline__ void multiply(Accumulators& acc, const Tokens& b, const uint8_t* stage,
                                         int slice, int warp_n) {
  const int lane = threadIdx.x % 32;
  const uint8_t* weights =
      stage + (slice * (TILE_N / 16) + warp_n * kRowTiles) * kRowTileBytes + lane * 16;
#if BITS == 8
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int step = 0; step < kSlice / 32; ++step) {
      const uint4 v = *reinterpret_cast<const uint4*>(weights + r * kRowTileBytes + step * 512);
      const uint32_t a[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        int (&c)[4] = acc[r][t];
        const uint32_t (&b_half)[4] = b[t][step / 2];
        mma_s8(c, a, b_half[step % 2 * 2], b_half[step % 2 * 2 + 1], c[0], c[1], c[2], c[3]);
      }
    }
  }
#else
  const int16_t* scales = reinterpret_cast<const int16_t*>(stage + kScalesAt) +
                          slice * kGroups * TILE_N + warp_n * kRowTiles * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
    const uint4 v0 = *reinterpret_cast<const uint4*>(weights + r * kRowTileBytes);
    const uint4 v1 = *reinterpret_cast<const uint4*>(weights + r * kRowTileBytes + 512);
    const uint32_t w[8] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
    int partial[kTokenTiles][4];
#pragma unroll
    for (int step = 0; step < kSlice / 32; ++step) {
      const int k = step * 32;
      const uint32_t w0 = w[step * 2], w1 = w[step * 2 + 1];
      const uint32_t a[4] = {(w0 << 4) & 0xf0f0f0f0, w0 & 0xf0f0f0f0, (w1 << 4) & 0xf0f0f0f0,
                             w1 & 0xf0f0f0f0};
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        int (&p)[4] = partial[t];
        const uint32_t (&b_half)[4] = b[t][step / 2];
        const uint32_t b0 = b_half[step % 2 * 2], b1 = b_half[step % 2 * 2 + 1];
        if (k % GROUP == 0) {
          mma_s8(p, a, b0, b1, 0, 0, 0, 0);
        } else {
          mma_s8(p, a, b0, b1, p[0], p[1], p[2], p[3]);
        }
      }
      if ((k + 32) % GROUP == 0) add_group(acc[r], partial, scales + k / GROUP * TILE_N + r * 16);
    }
  }
#endif
}

// Sums the WARPS_K partial tiles into `tile` int [TILE_M][kOutPitch], one k-slice at a time.
__device__ __forceinline__ void reduce_warps(int* tile, const Accumulators& acc, int warp_n,
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
            *cell = turn == 0 ? acc[r][t][i] : *cell + acc[r][t][i];
          }
        }
      }
    }
    __syncthreads();  // one warp's sum is complete
  }
}

// Leaves this block's sums in `partials`, those of all splits of its tile. Whether it is the last.
__device__ __forceinline__ bool meet_splits(const int* tile, int4* partials, int* arrivals,
                                            int rows) {
  __shared__ int arrived;
  int4* own = partials + blockIdx.z * (TILE_M * kVectors);
  for (int i = threadIdx.x; i < rows * kVectors; i += kThreads) {
    __stcg(own + i,
           *reinterpret_cast<const int4*>(tile + i / kVectors * kOutPitch + i % kVectors * 4));
  }
  __threadfence();
  __syncthreads();  // all of this block's sums are written
  if (threadIdx.x == 0) {
    arrived = atomicAdd(arrivals, 1);
    if (arrived == int(gridDim.z) - 1) *arrivals = 0;
  }
  __syncthreads();
  __threadfence();
  return arrived == int(gridDim.z) - 1;
}

#if DTYPE == INT32
using Out = int;
#else
using Out = uint16_t;
#endif
struct alignas(4 * sizeof(Out)) Vector {
  Out v[4];
};

struct OutputScales {  // of a thread's four channels
  float channel[4], bias[4];
};
__device__ __forceinline__ Out scale_output(int acc, const OutputScales& scales, int j, bool biased,
                                            float token_scale) {
#if DTYPE == INT32
  return acc;
#else
  float y = mul_rn(mul_rn(int_to_float(acc), scales.channel[j]), token_scale);
  if (biased) y = add_rn(y, scales.bias[j]);
  return from_float<DTYPE>(y);
#endif
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS)
    w4a8_gemm(const int8_t* a8, const float* token_scale, const uint8_t* qweight,
              const int16_t* group_scale, const float* channel_scale, const uint16_t* bias,
              Out* out, int4* partials, int m, int rows_padded, int n, int k_blocks,
              const int4* tiles, const int* tile_count) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int n0 = blockIdx.y * TILE_N, row_tiles = (n + 127) / 128 * 8;
  let_next_kernel_start();
#if GROUPED
  if (int(blockIdx.x) >= *tile_count) {
    wait_for_previous_kernel();  // of all blocks none may have a tile
    return;
  }
  const int64_t expert = token_tile(tiles, m).expert;
  qweight += expert * row_tiles * k_blocks * kRowTileBytes;
  group_scale += expert * k_blocks * kGroups * row_tiles * 16;
  channel_scale += expert * n;
#endif

  const int warp = threadIdx.x / 32;
  const int warp_n = warp % WARPS_N, warp_m = warp / WARPS_N % WARPS_M;
  const int warp_k = warp / (WARPS_N * WARPS_M);
  const int begin = k_blocks * blockIdx.z / gridDim.z;
  const int end = k_blocks * (blockIdx.z + 1) / gridDim.z;
  Sources from;
  {
    const int tile = threadIdx.x % kWeightChunks / kRowTileChunks;
    const int slice = threadIdx.x / kWeightChunks;
    from.weights = qweight + threadIdx.x % kRowTileChunks * 16 +
                   (int64_t(n0 / 16 + tile) * k_blocks + begin + slice) * kRowTileBytes;
    const int group = threadIdx.x / (TILE_N / 8), channel = n0 + threadIdx.x % (TILE_N / 8) * 8;
    from.scales = reinterpret_cast<const uint8_t*>(
        group_scale + (int64_t(begin) * kGroups + group) * (row_tiles * 16) + channel);
  }
  from.tokens = reinterpret_cast<const uint8_t*>(a8) + int64_t(begin) * rows_padded * 128;
  from.weight_slices = from.token_slices = end - begin;
  const int stages = (end - begin + WARPS_K - 1) / WARPS_K;
  const uint32_t base = shared_address(shared);
  for (int s = 0; s < min(STAGES - 1, stages); ++s) {
    load_weights(from, base + s * kStageBytes, k_blocks);
  }
  wait_for_previous_kernel();  // weights do not depend on it
  for_own_chunks<kTokenChunks>([&](int j, int slice) {
    const int i = threadIdx.x + j * kThreads;
    const TokenTile own = token_tile(tiles, m);
    const int row = own.m0 + min(i / 8 % TILE_M, own.rows - 1);  // past the end any
    from.token[j] = uint32_t(slice * rows_padded + row) * 128 + ((i % 8) ^ (row % 8)) * 16;
  });
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < stages) load_tokens(from, base + s * kStageBytes, rows_padded, row_tiles);
    commit_copies();
  }
  Accumulators acc = {};
  for (int s = 0; s < stages; ++s) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // stage s has arrived for all, and stage s - 1 is free for all
    const int stage = s % STAGES * kStageBytes, ahead = s + STAGES - 1;
    Tokens b;
    load_operands(b, base + stage, warp_k, warp_m);
    if (ahead < stages) {
      const uint32_t target = base + ahead % STAGES * kStageBytes;
      load_weights(from, target, k_blocks);
      load_tokens(from, target, rows_padded, row_tiles);
    }
    commit_copies();
    multiply(acc, b, shared + stage, warp_k, warp_n);
  }
  wait_copies<0>();
  __syncthreads();

  int* tile = reinterpret_cast<int*>(shared);
  reduce_warps(tile, acc, warp_n, warp_m, warp_k);
  const TokenTile own = token_tile(tiles, m);  // again, to leave its registers to the loop
  const int splits = GROUPED ? 1 : gridDim.z;
  if (splits > 1) {
    const int index = blockIdx.y * gridDim.x + blockIdx.x;
    int* flags =
        reinterpret_cast<int*>(const_cast<int8_t*>(a8) + int64_t(k_blocks) * rows_padded * 128);
    partials += int64_t(index) * splits * (TILE_M * kVectors);
    if (!meet_splits(tile, partials, flags + index, own.rows)) return;
  }
  const int column = threadIdx.x % kVectors * 4;
  OutputScales scales = {};
  if (DTYPE != INT32) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (n0 + column + j >= n) break;
      scales.channel[j] = channel_scale[n0 + column + j];
      if (bias != nullptr) scales.bias[j] = to_float<DTYPE>(bias[n0 + column + j]);
    }
  }
  for (int row = threadIdx.x / kVectors; row < own.rows; row += kThreads / kVectors) {
    int4 sum = *reinterpret_cast<const int4*>(tile + row * kOutPitch + column);
    for (int z = 0; z < splits; ++z) {
      if (z == int(blockIdx.z)) continue;
      const int4 part = __ldcg(partials + (z * TILE_M + row) * kVectors + column / 4);
      sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    const int v[4] = {sum.x, sum.y, sum.z, sum.w};
    const float scale = DTYPE == INT32 ? 0.0f : token_scale[own.m0 + row];
    Vector y;
#pragma unroll
    for (int j = 0; j < 4; ++j) y.v[j] = scale_output(v[j], scales, j, bias != nullptr, scale);
    Out* target_out = out + int64_t(own.m0 + row) * n + n0 + column;
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
