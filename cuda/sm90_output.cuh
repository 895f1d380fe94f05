// Part of sm90_w4a8_gemm.cu: accumulators to outputs, and sums over blocks that share a tile.
// Sums of int32 do not depend on their order.
#pragma once

struct ChannelScales {  // of a thread's two channels
  float scale[2], bias[2];
};
__device__ __forceinline__ ChannelScales load_channel_scales(const Problem& p, const Tile& t,
                                                             int warpgroup, int thread) {
  const int channel = t.n0 + channel_block(warpgroup) * 64 + channel_of(thread);
  const float* scales = p.channel_scale + int64_t(t.expert) * p.n;
  ChannelScales c;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = channel + 8 * h;
    c.scale[h] = n < p.n ? scales[n] : 0.0f;
    c.bias[h] = -0.0f;  // leaves every number as it is, -0.0 too
#if DTYPE != INT32 && !GROUPED
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

#if DTYPE == INT32
struct Writer {
  const Problem& p;
  const Tile& t;

  __device__ __forceinline__ Writer(const Problem& p, const Shared&, const Tile& t,
                                    const ChannelScales&)
      : p(p), t(t) {}

  __device__ __forceinline__ void write(int unit, const Accumulator* acc, int) const {
    const int lane = threadIdx.x % 32, block = channel_block(threadIdx.x / 128);
    const int channel = t.n0 + block * 64 + channel_of(threadIdx.x % 128);
#pragma unroll
    for (int i = 0; i < 4 * kUnitBlocks; ++i) {
      const int token = t.m0 + (unit * kUnitBlocks + i / 4) * 8 + lane % 4 * 2 + i % 2;
      const int n = channel + i / 2 % 2 * 8;
      if (token < t.m_end && n < p.n) p.out[int64_t(token) * row_of_outputs(p) + n] = Out(acc[i]);
    }
  }
  template <int first, int end>
  __device__ __forceinline__ void write(const Accumulator* acc) const {
#pragma unroll
    for (int unit = first; unit < end; ++unit) write(unit, acc + unit * kUnitBlocks * 4, 0);
  }
};
#else
// Writes the outputs of a warpgroup. They go through shared memory to become whole lines, a unit at
// a time, into one of two buffers in turn: [token][8 times 8 channels], these swizzled to spread
// them over the banks. Before a buffer is filled again there is one more barrier of the warpgroup.
class Writer {
 public:
  __device__ __forceinline__ Writer(const Problem& p, const Shared& s, const Tile& t,
                                    const ChannelScales& c)
      : c_(c), barrier_(1 + threadIdx.x / 128) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
    const uint32_t staging = s.staging + warpgroup * 2 * kBufferBytes;
    scales_ = s.scales + (warpgroup * kScaleTokens + lane % 4 * 4) * 4;
    // Lane 8 i + r stores row r of matrix i, which is block i / 2, channels 8 (i % 2) of the warp.
    const int stored_row = lane / 16 * 8 + lane % 8, stored_column = warp * 2 + lane / 8 % 2;
    store_at_ = staging + stored_row * 128 + (stored_column ^ stored_row % 8) * 16;
    const int row = warp * kUnitBlocks * 2 + lane / 8, column = lane % 8;
    load_at_ = staging + row * 128 + (column ^ row % 8) * 16;
    const int token = t.m0 + row, channel = t.n0 + channel_block(warpgroup) * 64 + column * 8;
    rows_ = channel < p.n && lane / 8 < kUnitBlocks * 2 ? t.m_end - token : 0;
    unit_step_ = kUnitBlocks * 8 * row_of_outputs(p);
    out_ = p.out + int64_t(token) * row_of_outputs(p) + channel;
  }

  __device__ __forceinline__ void write(int unit, const Accumulator* acc, int buffer) const {
    stage(scale_outputs(acc, token_scales(unit)), buffer);
    named_barrier(barrier_, 128);
    store(unit, staged(buffer));
  }
  // The same for units `first` to `end`. What is loaded is used a step later, or two.
  template <int first, int end>
  __device__ __forceinline__ void write(const Accumulator* acc) const {
    uint4 scales[2] = {token_scales(first)}, outputs;
    if (first + 1 < end) scales[1] = token_scales(first + 1);
#pragma unroll
    for (int unit = first; unit < end; ++unit) {
      const Words words = scale_outputs(acc + unit * kUnitBlocks * 4, scales[unit % 2]);
      if (unit > first) store(unit - 1, outputs);
      stage(words, unit % 2);
      if (unit + 2 < end) scales[unit % 2] = token_scales(unit + 2);
      named_barrier(barrier_, 128);
      outputs = staged(unit % 2);
    }
    store(end - 1, outputs);
  }

 private:
  static constexpr int kBufferBytes = kUnitBlocks * 8 * 128;
  struct Words {  // of outputs, two tokens each: [block][channel]
    uint32_t word[kUnitBlocks][2];
  };

  __device__ __forceinline__ uint4 token_scales(int unit) const {  // of the unit's four columns
    if (kUnitBlocks == 2) return load_shared(scales_ + unit * 64);
    const uint2 v = load_shared_pair(scales_);
    return {v.x, v.y, 0, 0};
  }
  __device__ __forceinline__ Words scale_outputs(const Accumulator* acc, uint4 scales) const {
    const uint32_t bits[4] = {scales.x, scales.y, scales.z, scales.w};
    Words words;
#pragma unroll
    for (int i = 0; i < kUnitBlocks * 2; ++i) {  // block, channel
      const float scale0 = __uint_as_float(bits[i / 2 * 2]);
      const float scale1 = __uint_as_float(bits[i / 2 * 2 + 1]);
      words.word[i / 2][i % 2] =
          from_floats<DTYPE>(scale_output(acc[2 * i], c_.scale[i % 2], scale0, c_.bias[i % 2]),
                             scale_output(acc[2 * i + 1], c_.scale[i % 2], scale1, c_.bias[i % 2]));
    }
    return words;
  }
  __device__ __forceinline__ void stage(const Words& v, int buffer) const {
    const uint32_t at = store_at_ + buffer * kBufferBytes;
    if constexpr (kUnitBlocks == 2) {
      store_matrix(at, v.word[0][0], v.word[0][1], v.word[1][0], v.word[1][1]);
    } else {
      store_matrix(at, v.word[0][0], v.word[0][1]);
    }
  }
  __device__ __forceinline__ uint4 staged(int buffer) const {
    return load_shared(load_at_ + buffer * kBufferBytes);
  }
  __device__ __forceinline__ void store(int unit, uint4 outputs) const {
    store_global(out_ + int64_t(unit) * unit_step_, outputs, unit * kUnitBlocks * 8 < rows_);
  }

  const ChannelScales& c_;
  const int barrier_;
  uint32_t scales_, store_at_, load_at_;
  int rows_, unit_step_;  // rows from this thread's first on; numbers from unit to unit
  Out* out_;
};
#endif

// Two warpgroups that have the same channels add their accumulators: each sends one half of the
// tokens to the other, through the ring, and adds and writes what it gets.
constexpr int kHalf = kAccumulators / 2, kHalfBytes = kHalf * 4 * 128;
static_assert(SLICES == 1 || SLICES * kHalfBytes <= STAGES * kStageBytes);

template <int slice>
__device__ __forceinline__ void send_half(const Shared& s, const Accumulator (&acc)[kAccumulators],
                                          int thread) {
  const uint32_t to = s.stages + (1 - slice) * kHalfBytes + thread * 16;
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const Accumulator* x = acc + (1 - slice) * kHalf + i;
    store_shared(to + i * 512, make_uint4(x[0], x[1], x[2], x[3]));
  }
}
template <int slice>
__device__ __forceinline__ void add_and_write_half(const Problem& p, const Shared& s, const Tile& t,
                                                   Accumulator (&acc)[kAccumulators],
                                                   const ChannelScales& c, int thread) {
  const uint32_t from = s.stages + slice * kHalfBytes + thread * 16;
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    Accumulator* sum = acc + slice * kHalf + i;
    const uint4 v = load_shared(from + i * 512);
    sum[0] += int(v.x), sum[1] += int(v.y), sum[2] += int(v.z), sum[3] += int(v.w);
  }
  Writer(p, s, t, c).template write<slice * kUnits / 2, (slice + 1) * kUnits / 2>(acc);
}
__device__ __forceinline__ void add_slices_and_write(const Problem& p, const Shared& s,
                                                     const Tile& t,
                                                     Accumulator (&acc)[kAccumulators],
                                                     const ChannelScales& c, int slice,
                                                     int thread) {
  named_barrier(1 + WARPGROUPS, kMultipliers);  // both have read the ring for the last time
  slice == 0 ? send_half<0>(s, acc, thread) : send_half<1>(s, acc, thread);
  named_barrier(1 + WARPGROUPS, kMultipliers);
  slice == 0 ? add_and_write_half<0>(p, s, t, acc, c, thread)
             : add_and_write_half<1>(p, s, t, acc, c, thread);
}

// Adds the accumulators of the cluster's blocks. Block `rank` gets and writes every size-th unit.
__device__ __forceinline__ void reduce_and_write(const Problem& p, const Shared& s, const Tile& t,
                                                 Accumulator (&acc)[kAccumulators],
                                                 const ChannelScales& c, int rank, int size) {
  constexpr int kBlockBytes = kMultipliers * 16, kUnitBytes = kUnitBlocks * kBlockBytes;
  if (kPartialsInRing) {  // every block has read its stages for the last time
    cluster_arrive_release();
    cluster_wait();
  }
  // In shared memory, what others send: [sender, without the receiver][unit][block][thread].
  const uint32_t sent = s.partials + threadIdx.x * 16;
  const int from_step = (kUnits + size - 1) / size * kUnitBytes;
  int owner = 0, at = 0;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    if (owner != rank) {
      const uint32_t to = sent + (rank - (rank > owner)) * from_step + at;
#pragma unroll
      for (int i = 0; i < kUnitBlocks; ++i) {
        const Accumulator* x = acc + (unit * kUnitBlocks + i) * 4;
        const int v[4] = {int(x[0]), int(x[1]), int(x[2]), int(x[3])};
        store_remote(to + i * kBlockBytes, s.reduced, owner, v);
      }
    }
    if (++owner == size) owner = 0, at += kUnitBytes;
  }
  barrier_wait(s.reduced, 0);
  const Writer writer(p, s, t, c);
  owner = 0, at = 0;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    if (owner == rank) {
      Accumulator* sum = acc + unit * kUnitBlocks * 4;
#pragma unroll 1
      for (int from = 0; from < size - 1; ++from) {
#pragma unroll
        for (int i = 0; i < kUnitBlocks; ++i) {
          const uint4 v = load_shared(sent + from * from_step + at + i * kBlockBytes);
          sum[4 * i] += int(v.x), sum[4 * i + 1] += int(v.y);
          sum[4 * i + 2] += int(v.z), sum[4 * i + 3] += int(v.w);
        }
      }
      writer.write(unit, sum, at / kUnitBytes % 2);
    }
    if (++owner == size) owner = 0, at += kUnitBytes;
  }
}

// A block that begins inside a tile leaves its sums to the block that began the tile.
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

// Adds what `followers` blocks left, which the load warp puts into the ring.
__device__ __forceinline__ void add_partials(Accumulator (&acc)[kAccumulators], const Shared& s,
                                             Ring ring, int followers, int warpgroup, int thread) {
#pragma unroll 1
  for (int i = 0; i < followers; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenBlocks; j += kPartialBlocks) {
      const uint32_t barriers = s.barriers + ring.barriers();
      barrier_wait(barriers + kReady, ring.parity);
      const uint32_t at = s.stages + ring.offset + (warpgroup * kPartialBlocks * 128 + thread) * 16;
      uint32_t last = 0;
#pragma unroll
      for (int k = 0; k < kPartialBlocks; ++k) {
        const uint4 v = load_shared(at + k * 2048);
        Accumulator* sum = acc + (j + k) * 4;
        sum[0] += int(v.x), sum[1] += int(v.y), sum[2] += int(v.z), sum[3] += int(v.w);
        last = v.w;
      }
      // The address depends on what was loaded, by a zero: an arrival overtakes loads.
      release(barriers + kEmpty + (last & s.stages >> 31));
      ring.advance();
    }
  }
}
