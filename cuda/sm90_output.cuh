// Part of sm90_w4a8_gemm.cu: accumulators to outputs, and sums over blocks that share a tile.
// Sums of int32 do not depend on their order.
#pragma once

struct ChannelScales {  // of a thread's two channels
  float scale[2], bias[2];
};
__device__ __forceinline__ ChannelScales load_channel_scales(const Problem& p, int channel) {
  ChannelScales c;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = channel + 8 * h;
    c.scale[h] = n < p.n ? p.channel_scale[n] : 0.0f;
    c.bias[h] = -0.0f;  // leaves every number as it is, -0.0 too
#if DTYPE != INT32
    if (p.bias != nullptr && n < p.n) c.bias[h] = to_float<DTYPE>(p.bias[n]);
#endif
  }
  return c;
}

__device__ __forceinline__ float scale_output(Accumulator acc, float channel_scale,
                                              float token_scale, float bias) {
  return add_rn(mul_rn(mul_rn(float(acc), channel_scale), token_scale), bias);
}

#if DTYPE == INT32
__device__ __forceinline__ Out to_out(Accumulator y) { return Out(y); }
#else
__device__ __forceinline__ Out to_out(float y) { return from_float<DTYPE>(y); }
#endif

// Writes 16 channels of a warp for `blocks` blocks of 8 tokens, from the tile's block `first` on.
template <int blocks>
__device__ __forceinline__ void write_out(const Problem& p, const Shared& s, const Tile& t,
                                          const Accumulator* acc, const ChannelScales& c, int first,
                                          int warp) {
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int channel = t.n0 + warp * 16, token0 = t.m0 + first * 8;
  const uint32_t staging = s.staging + warp * kChunk * 32;
  const uint32_t scales = s.scales + (warp / 4 * TILE_M + first * 8 + 2 * q) * 4;
  const bool vectors = DTYPE != INT32 && p.n % 8 == 0;
  if (token0 >= p.m) return;
#pragma unroll
  for (int j = 0; j < blocks; ++j) {
    float token_scale[2];
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(token_scale[0]), "=f"(token_scale[1])
                 : "r"(scales + j * 32)
                 : "memory");
#if DTYPE == INT32
    const Accumulator* y = acc + 4 * j;
#else
    float y[4];  // [channel][token]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = scale_output(acc[4 * j + i], c.scale[i / 2], token_scale[i % 2], c.bias[i / 2]);
    }
    if (vectors) {  // to [token][two halves of 8 channels], halves swapped every four tokens
      const int row = j * 8 + lane % 8, half = (lane / 8 % 2) ^ (row / 4 % 2);
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                       staging + row * 32 + half * 16),
                   "r"(from_floats<DTYPE>(y[0], y[1])), "r"(from_floats<DTYPE>(y[2], y[3]))
                   : "memory");
      continue;
    }
#endif
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = token0 + j * 8 + 2 * q + i % 2, n = channel + g + i / 2 * 8;
      if (token < p.m && n < p.n) p.out[int64_t(token) * p.n + n] = to_out(y[i]);
    }
  }
  if (!vectors) return;
  __syncwarp();  // the staging holds the chunk
#pragma unroll
  for (int i = 0; i < (blocks * 16 + 31) / 32; ++i) {
    const int row = i * 16 + lane / 2, half = lane % 2;
    const int token = token0 + row, n = channel + half * 8;
    if (row < blocks * 8 && token < p.m && n < p.n) {
      *reinterpret_cast<uint4*>(p.out + int64_t(token) * p.n + n) =
          load_shared(staging + row * 32 + (half ^ (row / 4 % 2)) * 16);
    }
  }
  __syncwarp();  // the staging is free
}

// Adds the accumulators of the cluster's blocks. Block `rank` gets and writes every size-th block
// of 8 tokens.
__device__ __forceinline__ void reduce_and_write(const Problem& p, const Shared& s, const Tile& t,
                                                 const Accumulator (&acc)[kAccumulators],
                                                 const ChannelScales& c, int rank, int size) {
  const int slots = (kTokenBlocks + size - 1) / size;  // [from][slot][thread][16 bytes]
  if (kPartialsInRing) {  // every block has read its stages for the last time
    cluster_arrive_release();
    cluster_wait();
  }
#pragma unroll
  for (int j = 0; j < kTokenBlocks; ++j) {
    const int v[4] = {int(acc[4 * j]), int(acc[4 * j + 1]), int(acc[4 * j + 2]),
                      int(acc[4 * j + 3])};
    const int slot = (rank * slots + j / size) * kMultipliers + threadIdx.x;
    store_remote(s.partials + slot * 16, s.reduced, j % size, v);
  }
  barrier_wait(s.reduced, 0);
  for (int j = rank; j < kTokenBlocks; j += size) {
    Accumulator sum[4] = {};
    for (int from = 0; from < size; ++from) {
      const int slot = (from * slots + j / size) * kMultipliers + threadIdx.x;
      const uint4 v = load_shared(s.partials + slot * 16);
      sum[0] += int(v.x), sum[1] += int(v.y), sum[2] += int(v.z), sum[3] += int(v.w);
    }
    write_out<1>(p, s, t, sum, c, j, threadIdx.x / 32);
  }
}

// A block that begins inside a tile leaves its sums to the block that began the tile:
// partials [block of the grid][warpgroup][16 bytes of a thread][thread], then its flag is raised.
__device__ __forceinline__ int* flag_of(const Problem& p, int block, int warpgroup) {
  int8_t* flags = const_cast<int8_t*>(p.a8) + int64_t(p.k_blocks) * p.m_pad * kStageK;
  return reinterpret_cast<int*>(flags) + block * WARPGROUPS + warpgroup;
}
__device__ __forceinline__ int4* partial_of(const Problem& p, int block, int warpgroup) {
  return p.partials + int64_t(block * WARPGROUPS + warpgroup) * kTokenBlocks * 128;
}

__device__ __forceinline__ void leave_partial(const Problem& p,
                                              const Accumulator (&acc)[kAccumulators],
                                              int warpgroup, int thread) {
  int4* partial = partial_of(p, blockIdx.x, warpgroup) + thread;
#pragma unroll
  for (int j = 0; j < kTokenBlocks; ++j) {
    partial[j * 128] = make_int4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
  }
  named_barrier(1 + warpgroup, 128);
  if (thread == 0) raise_flag(flag_of(p, blockIdx.x, warpgroup));
}

// Adds what `followers` blocks left. They are those before this one in the grid
// (sm90_schedule.cuh). Their flags are lowered again for the next launch.
__device__ __forceinline__ void collect_partials(const Problem& p,
                                                 Accumulator (&acc)[kAccumulators], int followers,
                                                 int warpgroup, int thread) {
  if (thread < followers)
    await_and_lower_flag(flag_of(p, blockIdx.x - SHARE * (1 + thread), warpgroup));
  named_barrier(1 + warpgroup, 128);
#pragma unroll 1
  for (int i = 1; i <= followers; ++i) {
    const int4* partial = partial_of(p, blockIdx.x - SHARE * i, warpgroup) + thread;
#pragma unroll
    for (int j = 0; j < kTokenBlocks; ++j) {
      const int4 v = load_global(partial + j * 128);
      acc[4 * j] += v.x, acc[4 * j + 1] += v.y, acc[4 * j + 2] += v.z, acc[4 * j + 3] += v.w;
    }
  }
}
