// W4A8 GEMM with integer group scales on Hopper: wgmma, bulk copies, warp specialization.
//
//   FOLD=1   out[m, n] = float(sum_k a8[m, k] * w8[n, k]) * channel_scale[n] * token_scale[m]
//                        + bias[n],  w8 of fold.cuh       (reference.fold, then reference.gemm)
//   FOLD=0   the same with sum_g S[n, g] * sum_{k in g} a8[m, k] * w4[n, k]    (reference.gemm)
//
// Contract (bit-identical to the reference)
//   a8            int8, the layout of common.cuh, m_pad rows (m rounded up to 8)
//   token_scale   float32 [m]
//   weight        blocks of 64 channels x 128 k, [ceil(n / 128)][ceil(k / 128)][2][block], see
//   below unit          float32 [n rounded up to 128], 127 / m of fold.cuh (FOLD=0: not read)
//   channel_scale float32 [n];  bias DTYPE [n] or nullptr
//   out           DTYPE [m, n]; with -DDTYPE=INT32 the accumulators
//   grid          clusters of 1 to 8 blocks; a cluster takes tiles of TILE_M tokens x
//                 64 * WARPGROUPS channels, every (number of clusters)-th one. Its blocks share the
//                 k of a tile and add their int32 sums, so a cluster of more than one block takes
//                 exactly one tile. Block: 128 * (WARPGROUPS + 1) threads.
//   May be launched to overlap the kernel before: weights load first, a8 after that one is done. So
//   the kernel right before must not be one that writes the weights.
//
// A block of weights is what one warpgroup multiplies at a time, as the A operand (m64n*k32, in
// registers): warp w, lane 4 g + t holds channels 16 w + g ("first") and 16 w + g + 8 ("second").
//
//   [2 halves][128 threads][4 words]      words of half h: k-step 2 h first, 2 h second, 2 h + 1
//   [128 / GROUP][64] uint16              first, 2 h + 1 second; a word is nibbles of k + 4 t +
//   0..3,
//                                         then of k + 16 + 4 t + 0..3 (codes: fold.cuh)
//   the scales: fields of fold.cuh with FOLD=1, S as int16 with FOLD=0
//
// One stage of shared memory is 128 k of a tile:
//
//   tokens [TILE_M][128]    the B operand, swizzled as it lies in global memory
//   weights [WARPGROUPS][block], tables [WARPGROUPS][128 / GROUP][64][16] (FOLD=1)
//
//     load warp ---full--> table warps (3) ---ready--> multiplying warpgroups ---empty--> load warp
//
// Without FOLD there are no tables and the multipliers wait for `full` themselves.
#include "common.cuh"
#include "fold.cuh"
#include "hopper.cuh"

constexpr int kThreads = 128 * (WARPGROUPS + 1);  // the last warpgroup loads and builds tables
constexpr int kMultipliers = 128 * WARPGROUPS;
constexpr int kTableWarps = 3;
constexpr int kStageK = 128;
constexpr int kGroups = kStageK / GROUP;
constexpr int kSteps = kStageK / 32;
constexpr int kNibbleBytes = 64 * kStageK / 2;
constexpr int kBlockBytes = kNibbleBytes + kGroups * 64 * 2;
constexpr int kWeightBytes = WARPGROUPS * kBlockBytes;
constexpr int kTokenBytes = TILE_M * kStageK;
constexpr int kTableBytes = FOLD ? WARPGROUPS * kGroups * 64 * 16 : 0;
constexpr int kStageBytes = kTokenBytes + (kWeightBytes + kTableBytes + 1023) / 1024 * 1024;
constexpr int kTokenBlocks = TILE_M / 8;  // a thread holds 2 channels x 2 tokens of each
constexpr int kAccumulators = TILE_M / 2;
constexpr int kChunk = TILE_M < 32 ? TILE_M : 32;  // tokens that a warp transposes at a time
constexpr int kStagingBytes = WARPGROUPS * 4 * kChunk * 32;
constexpr int kScaleBytes = WARPGROUPS * TILE_M * 4;  // token scales, a copy for each warpgroup
// Registers of a thread: at launch, of the last warpgroup, of the others.
constexpr int kRegisters = 65536 / (kThreads * MIN_BLOCKS) / 8 * 8;
constexpr int kLoadRegisters = kRegisters > 100 ? 72 : 56;
constexpr int kMultiplyRegisters =
    (kRegisters * (WARPGROUPS + 1) - kLoadRegisters) / WARPGROUPS / 8 * 8;

#if DTYPE == INT32
using Out = int;
#else
using Out = uint16_t;
#endif
#if FLOAT_SCALE  // float32 group scales on the partial sums, for the comparison in the benchmark
using Accumulator = float;
#else
using Accumulator = int;
#endif

struct Problem {
  const int8_t* a8;
  const float* token_scale;
  const uint8_t* weight;
  const float* unit;
  const float* channel_scale;
  const uint16_t* bias;
  Out* out;
  int m, m_pad, n, k_blocks;
};

struct Shared {  // addresses in shared memory
  uint32_t stages, staging, scales, full, ready, empty, reduced, partials;
};

struct Tile {
  int n0, m0;  // first channel, first token
};
__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
  const int m_tiles = (p.m_pad + TILE_M - 1) / TILE_M;
  return {index / m_tiles * 64 * WARPGROUPS, index % m_tiles * TILE_M};
}

struct Work {
  int first, step, tiles;  // tiles of this cluster
  int k_begin, k_count;    // blocks of 128 k of this block
};

struct Ring {     // a position in the ring of stages; every role walks all stages in order, since a
  int stage = 0;  // parity tells no more than two phases of a barrier apart
  int parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// ---- load warp ---------------------------------------------------------------------------------

// Two copies a stage. Pointers are carried along: what this warp computes between an empty stage
// and its copies is latency for all the others.
__device__ __forceinline__ void load(const Problem& p, const Shared& s, const Work& w) {
  constexpr int kPairBytes = 2 * kBlockBytes;
  const bool leader = elect_one();
  const uint64_t token_policy = read_again();
  const uint64_t weight_policy = p.m_pad <= TILE_M ? read_once() : token_policy;
  const int64_t token_step = int64_t(p.m_pad) * kStageK;
  Ring ring;
  int early = 0;  // stages that have their weights and wait for tokens
  bool waited = false;
  for (int index = w.first; index < w.tiles; index += w.step) {
    const Tile t = tile_at(p, index);
    const int token_bytes = min(TILE_M, p.m_pad - t.m0) * kStageK;
    const uint8_t* weights = p.weight + t.n0 / 64 % 2 * kBlockBytes +
                             (int64_t(t.n0 / 128) * p.k_blocks + w.k_begin) * kPairBytes;
    const int8_t* tokens = p.a8 + w.k_begin * token_step + t.m0 * kStageK;
    for (int k = 0; k < w.k_count; ++k) {
      const uint32_t full = s.full + ring.stage * 8, at = s.stages + ring.stage * kStageBytes;
      barrier_wait(s.empty + ring.stage * 8, ring.parity ^ 1);
      if (leader) {
        barrier_expect(full, kWeightBytes + token_bytes);
        bulk_copy(at + kTokenBytes, weights, kWeightBytes, full, weight_policy);
        if (waited) bulk_copy(at, tokens, token_bytes, full, token_policy);
      }
      weights += kPairBytes;
      if (waited) tokens += token_step;
      ring.advance();
      if (!waited && (++early == STAGES || k + 1 == w.k_count)) {
        wait_for_previous_kernel();
        waited = true;
        for (int i = 0; i < early; ++i) {
          if (leader) {
            bulk_copy(s.stages + i * kStageBytes, tokens, token_bytes, s.full + i * 8,
                      token_policy);
          }
          tokens += token_step;
        }
      }
    }
  }
}

// ---- table warps -------------------------------------------------------------------------------

// Warp `turn` of them builds the tables of every third stage, two channels a lane and block.
__device__ __forceinline__ void build_tables(const Problem& p, const Shared& s, const Work& w,
                                             int turn, int lane) {
  Ring ring;
  for (int index = w.first; index < w.tiles; index += w.step) {
    const Tile t = tile_at(p, index);
    float unit[WARPGROUPS][2];
#pragma unroll
    for (int i = 0; i < WARPGROUPS * 2; ++i) {
      unit[i / 2][i % 2] = p.unit[t.n0 + i / 2 * 64 + lane * 2 + i % 2];
    }
    for (int k = 0; k < w.k_count; ++k) {
      barrier_wait(s.full + ring.stage * 8, ring.parity);
      if (turn == 0) {
        const uint32_t weights = s.stages + ring.stage * kStageBytes + kTokenBytes;
#pragma unroll
        for (int i = 0; i < WARPGROUPS * kGroups; ++i) {  // block, group
          const int block = i / kGroups, group = i % kGroups;
          uint32_t fields;
          asm volatile("ld.shared.u32 %0, [%1];"
                       : "=r"(fields)
                       : "r"(weights + block * kBlockBytes + kNibbleBytes + group * 128 + lane * 4)
                       : "memory");
          const uint32_t tables = weights + kWeightBytes + (i * 64 + lane * 2) * 16;
          store_shared(tables, build_table(fields & 0xffff, unit[block][0]));
          store_shared(tables + 16, build_table(fields >> 16, unit[block][1]));
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(s.ready + ring.stage * 8);
      }
      turn = turn == 0 ? kTableWarps - 1 : turn - 1;
      ring.advance();
    }
  }
}

// ---- multiplying warpgroups --------------------------------------------------------------------

struct Weights {      // of a thread, in one stage
  uint32_t words[8];  // two a k-step: the first channel's nibbles, the second channel's
  uint4 low, high;    // tables of the two channels, for the group at hand
};

__device__ __forceinline__ void load_weights(Weights& v, const Shared& s, const Ring& ring,
                                             int warpgroup, int thread) {
  // A table is built after its stage is full.
  barrier_wait((FOLD ? s.ready : s.full) + ring.stage * 8, ring.parity);
  const uint32_t block =
      s.stages + ring.stage * kStageBytes + kTokenBytes + warpgroup * kBlockBytes;
  const uint4 v0 = load_shared(block + thread * 16);
  const uint4 v1 = load_shared(block + 2048 + thread * 16);
  v.words[0] = v0.x, v.words[1] = v0.y, v.words[2] = v0.z, v.words[3] = v0.w;
  v.words[4] = v1.x, v.words[5] = v1.y, v.words[6] = v1.z, v.words[7] = v1.w;
}
// First channel of a thread, of 64.
__device__ __forceinline__ int channel_of(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// Operand of k-step `step`. A group's tables are fetched at its first step.
__device__ __forceinline__ void unpack(uint32_t (&a)[4], Weights& v, const Shared& s, int stage,
                                       int step, int warpgroup, int thread) {
#if FOLD
  if (step * 32 % GROUP == 0) {
    const uint32_t tables =
        s.stages + stage * kStageBytes + kTokenBytes + kWeightBytes +
        ((warpgroup * kGroups + step * 32 / GROUP) * 64 + channel_of(thread)) * 16;
    v.low = load_shared(tables);
    v.high = load_shared(tables + 8 * 16);
  }
#else
  v.low = v.high = identity_table();
#endif
  look_up(a[0], a[2], v.words[2 * step], v.low);
  look_up(a[1], a[3], v.words[2 * step + 1], v.high);
}

__device__ __forceinline__ void release(const Shared& s, int stage) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(s.empty + stage * 8);
}

#if !FOLD
__device__ __forceinline__ Accumulator load_scale(uint32_t address) {
  int v;
  asm volatile("ld.shared.s16 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return Accumulator(v);
}
// acc += S * partial for one group, S at its two channels.
__device__ __forceinline__ void add_group(Accumulator (&acc)[kAccumulators],
                                          const int (&partial)[kAccumulators], uint32_t scales) {
  const Accumulator low = load_scale(scales), high = load_scale(scales + 8 * 2);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    acc[i] += (i % 4 < 2 ? low : high) * Accumulator(partial[i]);
  }
}
#endif

// acc <- the products of one tile, this block's share of k. The operands of the next BATCH k-steps
// are unpacked while the multiplications of these run.
__device__ __forceinline__ void multiply(Accumulator (&acc)[kAccumulators], const Shared& s,
                                         Ring& ring, int k_count, int warpgroup, int thread) {
  uint32_t a[2][BATCH][4];
  Weights weights;
#if !FOLD
  int partial[kAccumulators];
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) acc[i] = 0;
#endif
  load_weights(weights, s, ring, warpgroup, thread);
#pragma unroll
  for (int j = 0; j < BATCH; ++j) {
    unpack(a[0][j], weights, s, ring.stage, j, warpgroup, thread);
  }
  int previous = -1;
  for (int i = 0; i < k_count; ++i) {
    const int stage = ring.stage;
    const uint32_t at = s.stages + stage * kStageBytes;
    const uint64_t tokens = wgmma_descriptor(at);
    const bool more = i + 1 < k_count;
#pragma unroll
    for (int step = 0; step < kSteps; step += BATCH) {
      const int batch = step / BATCH;
      wgmma_fence();
#pragma unroll
      for (int j = 0; j < BATCH; ++j) {
#if FOLD
        wgmma_s8<TILE_M>(acc, a[batch % 2][j], tokens + 2 * (step + j), i == 0 && step + j == 0);
#else
        wgmma_s8<TILE_M>(partial, a[batch % 2][j], tokens + 2 * (step + j),
                         (step + j) * 32 % GROUP == 0);
#endif
      }
      wgmma_commit();
      wgmma_wait<1>();  // the batch before has read its operands and, at step 0, its stage
      if (step == 0 && previous >= 0) release(s, previous);
      const bool last = step + BATCH == kSteps;
      if (!last || more) {
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          unpack(a[(batch + 1) % 2][j], weights, s, last ? ring.stage : stage,
                 (step + BATCH + j) % kSteps, warpgroup, thread);
        }
      }
      if (step + 2 * BATCH == kSteps) {  // the words of this stage are all unpacked
        ring.advance();
        if (more) load_weights(weights, s, ring, warpgroup, thread);
      }
#if !FOLD
      if ((step + BATCH) * 32 % GROUP == 0) {
        wgmma_wait<0>();
        add_group(acc, partial,
                  at + kTokenBytes + warpgroup * kBlockBytes + kNibbleBytes +
                      (step * 32 / GROUP * 64 + channel_of(thread)) * 2);
      }
#endif
    }
    previous = stage;
  }
  wgmma_wait<0>();
  release(s, previous);
}

// ---- output ------------------------------------------------------------------------------------

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

__device__ __forceinline__ Out scale_output(Accumulator acc, float channel_scale, float token_scale,
                                            float bias) {
#if DTYPE == INT32
  return Out(acc);
#else
  const float y = mul_rn(mul_rn(float(acc), channel_scale), token_scale);
  return from_float<DTYPE>(add_rn(y, bias));
#endif
}

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
    Out y[4];  // [channel][token]
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = scale_output(acc[4 * j + i], c.scale[i / 2], token_scale[i % 2], c.bias[i / 2]);
    }
    if (vectors) {  // to [token][two halves of 8 channels], halves swapped every four tokens
      const int row = j * 8 + lane % 8, half = (lane / 8 % 2) ^ (row / 4 % 2);
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                       staging + row * 32 + half * 16),
                   "r"(uint32_t(y[0]) | uint32_t(y[1]) << 16),
                   "r"(uint32_t(y[2]) | uint32_t(y[3]) << 16)
                   : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = token0 + j * 8 + 2 * q + i % 2, n = channel + g + i / 2 * 8;
        if (token < p.m && n < p.n) p.out[int64_t(token) * p.n + n] = y[i];
      }
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
// of 8 tokens. Sums of int32 do not depend on their order.
__device__ __forceinline__ void reduce_and_write(const Problem& p, const Shared& s, const Tile& t,
                                                 const Accumulator (&acc)[kAccumulators],
                                                 const ChannelScales& c, int rank, int size) {
  const int slots = (kTokenBlocks + size - 1) / size;  // [from][slot][thread][16 bytes]
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

__device__ __forceinline__ void multiply_tiles(const Problem& p, const Shared& s, const Work& w,
                                               int rank, int size, int warp) {
  const int warpgroup = warp / 4, thread = threadIdx.x % 128;
  wait_for_previous_kernel();  // it may have written the token scales
  Ring ring;
  for (int index = w.first; index < w.tiles; index += w.step) {
    const Tile t = tile_at(p, index);
    // What the output needs is under way while the tile is multiplied.
    const ChannelScales c = load_channel_scales(p, t.n0 + warpgroup * 64 + channel_of(thread));
    constexpr int kScales = (TILE_M + 127) / 128;
    float token_scale[kScales];
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int token = t.m0 + i * 128 + thread;
      token_scale[i] = DTYPE != INT32 && token < p.m ? p.token_scale[token] : 0.0f;
    }
    Accumulator acc[kAccumulators];
    multiply(acc, s, ring, w.k_count, warpgroup, thread);
    named_barrier(1 + warpgroup, 128);  // the scales of the tile before have been read
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int token = i * 128 + thread;
      if (token < TILE_M) {
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(s.scales + (warpgroup * TILE_M + token) * 4),
                     "f"(token_scale[i])
                     : "memory");
      }
    }
    named_barrier(1 + warpgroup, 128);  // the scales of this tile are there
    if (size > 1) {
      reduce_and_write(p, s, t, acc, c, rank, size);
    } else {
      constexpr int kChunkBlocks = kChunk / 8;
#pragma unroll
      for (int j = 0; j < kTokenBlocks; j += kChunkBlocks) {
        write_out<kChunkBlocks>(p, s, t, acc + 4 * j, c, j, warp);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
    w4a8_gemm(const int8_t* a8, const float* token_scale, const uint8_t* weight, const float* unit,
              const float* channel_scale, const uint16_t* bias, Out* out, int m, int m_pad, int n,
              int k_blocks) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Problem p = {a8,  token_scale, weight, unit, channel_scale, bias,
                     out, m,           m_pad,  n,    k_blocks};
  const int size = cluster_size(), rank = cluster_rank();
  Shared s;
  s.stages = shared_address(memory);
  s.staging = s.stages + STAGES * kStageBytes;
  s.scales = s.staging + kStagingBytes;
  s.full = s.scales + kScaleBytes;
  s.ready = s.full + STAGES * 8;
  s.empty = s.ready + STAGES * 8;
  s.reduced = s.empty + STAGES * 8;
  s.partials = (s.reduced + 8 + 15) / 16 * 16;

  Work w;
  w.first = blockIdx.x / size;
  w.step = gridDim.x / size;
  w.tiles = (n + 64 * WARPGROUPS - 1) / (64 * WARPGROUPS) * ((m_pad + TILE_M - 1) / TILE_M);
  w.k_begin = k_blocks * rank / size;
  w.k_count = k_blocks * (rank + 1) / size - w.k_begin;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(s.full + i * 8, 1);
      barrier_init(s.ready + i * 8, 1);
      barrier_init(s.empty + i * 8, kMultipliers / 32);
    }
    barrier_init(s.reduced, 1);
    barrier_init_fence();
    const int owned = (kTokenBlocks - rank + size - 1) / size;  // see reduce_and_write
    barrier_expect(s.reduced, size * owned * kMultipliers * 16);
  }
  __syncthreads();
  let_next_kernel_start();
  if (size > 1) cluster_arrive();

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform for the compiler too
  if (warp / 4 < WARPGROUPS) {
    raise_registers<kMultiplyRegisters>();
    if (size > 1) cluster_wait();  // the others' barriers exist
    multiply_tiles(p, s, w, rank, size, warp);
  } else {
    lower_registers<kLoadRegisters>();
    if (warp % 4 == 0) {
      load(p, s, w);
    } else if (FOLD) {
      build_tables(p, s, w, warp % 4 - 1, threadIdx.x % 32);
    }
    if (size > 1) cluster_wait();
  }
}
