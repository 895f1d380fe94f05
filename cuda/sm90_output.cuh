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

// The token scales of a thread's columns, tokens 8 j + 2 q + 0..1, lie together for j = 2 i, 2 i +
// 1: [16 tokens][q][j % 2][2].
__device__ __forceinline__ int place_of_scale(int token) {
  return token / 16 * 16 + token % 8 / 2 * 4 + token / 8 % 2 * 2 + token % 2;
}

// Rows of the output are written 16 bytes at a time.
__device__ __forceinline__ int row_of_outputs(const Problem& p) { return (p.n + 7) / 8 * 8; }

// Writes the 64 channels of a warpgroup for `blocks` blocks of 8 tokens, from block `first` of the
// tile on.
#if DTYPE == INT32
template <int blocks>
__device__ __forceinline__ void write_out(const Problem& p, const Shared&, const Tile& t,
                                          const Accumulator* acc, const ChannelScales&, int first,
                                          int = 0) {
  const int lane = threadIdx.x % 32, channel = t.n0 + threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 4 * blocks; ++i) {
    const int token = t.m0 + (first + i / 4) * 8 + lane % 4 * 2 + i % 2,
              n = channel + i / 2 % 2 * 8;
    if (token < p.m && n < p.n) p.out[int64_t(token) * row_of_outputs(p) + n] = Out(acc[i]);
  }
}
#else
// Two channels of two tokens: a word of the tokens' outputs for each channel.
__device__ __forceinline__ uint2 scale_outputs(const Accumulator* acc, const ChannelScales& c,
                                               uint32_t token_scale0, uint32_t token_scale1) {
  const float scale0 = __uint_as_float(token_scale0), scale1 = __uint_as_float(token_scale1);
  return {from_floats<DTYPE>(scale_output(acc[0], c.scale[0], scale0, c.bias[0]),
                             scale_output(acc[1], c.scale[0], scale1, c.bias[0])),
          from_floats<DTYPE>(scale_output(acc[2], c.scale[1], scale0, c.bias[1]),
                             scale_output(acc[3], c.scale[1], scale1, c.bias[1]))};
}

template <int blocks>
__device__ __forceinline__ uint4 load_scales(uint32_t address) {
  if (blocks == 2) return load_shared(address);
  const uint2 v = load_shared_pair(address);
  return {v.x, v.y, v.x, v.y};
}

template <int blocks>
__device__ __forceinline__ void store_matrices(uint32_t address, uint2 v, uint2 w) {
  if (blocks == 2) {
    store_matrix(address, v.x, v.y, w.x, w.y);
  } else {
    store_matrix(address, v.x, v.y);
  }
}

// A warpgroup's outputs go through shared memory to become whole lines, kChunk tokens at a time and
// into one of two buffers in turn: [token][8 times 8 channels], which are swizzled to spread them
// over the banks. Between two calls there is a barrier of the warpgroup, or `buffer` changes.
template <int blocks>
__device__ __forceinline__ void write_out(const Problem& p, const Shared& s, const Tile& t,
                                          const Accumulator* acc, const ChannelScales& c, int first,
                                          int buffer = 0) {
  constexpr int kBlocks = blocks < 2 ? 1 : 2;  // of 8 tokens, at a time
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
  uint32_t staging = s.staging + (warpgroup * 2 + buffer) * kChunk * 128;
  const uint32_t scales =
      s.scales + (warpgroup * kScaleTokens + first / 2 * 16 + lane % 4 * 4 + first % 2 * 2) * 4;
  const int store_row = lane / 16 * 8 + lane % 8, store_column = warp * 2 + lane / 8 % 2;
  const uint32_t store_at = store_row * 128 + (store_column ^ store_row % 8) * 16;
  const int row = warp * kBlocks * 2 + lane / 8, column = lane % 8;
  const uint32_t load_at = row * 128 + (column ^ row % 8) * 16;
  const int token = t.m0 + first * 8 + row, channel = t.n0 + warpgroup * 64 + column * 8;
  const int rows = channel < p.n && lane / 8 < kBlocks * 2 ? p.m - token : 0;  // from this one on
  const int64_t stride = int64_t(kBlocks) * 8 * row_of_outputs(p);
  Out* out = p.out + int64_t(token) * row_of_outputs(p) + channel;

  // What is loaded is used a step later.
  uint4 scale = load_scales<kBlocks>(scales), outputs;
#pragma unroll
  for (int j = 0; j < blocks; j += kBlocks) {
    const uint2 v = scale_outputs(acc + 4 * j, c, scale.x, scale.y),
                w = kBlocks == 1 ? v : scale_outputs(acc + 4 * j + 4, c, scale.z, scale.w);
    if (j > 0) {
      if ((j - kBlocks) * 8 < rows) *reinterpret_cast<uint4*>(out) = outputs;
      out += stride;
    }
    store_matrices<kBlocks>(staging + store_at, v, w);
    if (j + kBlocks < blocks) scale = load_scales<kBlocks>(scales + (j + kBlocks) / 2 * 64);
    named_barrier(1 + warpgroup, 128);
    outputs = load_shared(staging + load_at);
    staging += (j / kBlocks + buffer) % 2 == 0 ? kChunk * 128 : -kChunk * 128;
  }
  if ((blocks - kBlocks) * 8 < rows) *reinterpret_cast<uint4*>(out) = outputs;
}
#endif

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
  const uint32_t own = s.partials + threadIdx.x * 16, from_step = slots * kMultipliers * 16;
  uint32_t at = own + rank * from_step, to = 0;
#pragma unroll
  for (int j = 0; j < kTokenBlocks; ++j) {
    const int v[4] = {int(acc[4 * j]), int(acc[4 * j + 1]), int(acc[4 * j + 2]),
                      int(acc[4 * j + 3])};
    store_remote(at, s.reduced, to, v);
    if (++to == size) to = 0, at += kMultipliers * 16;
  }
  barrier_wait(s.reduced, 0);
  at = own;
  int buffer = 0;
  for (int j = rank; j < kTokenBlocks; j += size, buffer ^= 1) {
    Accumulator sum[4] = {};
    for (int from = 0; from < size; ++from) {
      const uint4 v = load_shared(at + from * from_step);
      sum[0] += int(v.x), sum[1] += int(v.y), sum[2] += int(v.z), sum[3] += int(v.w);
    }
    write_out<1>(p, s, t, sum, c, j, buffer);
    at += kMultipliers * 16;
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
