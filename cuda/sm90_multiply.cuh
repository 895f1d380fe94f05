// Part of sm90_w4a8_gemm.cu: the main loop of a multiplying warpgroup, stages to accumulators.
//
// Two warps a scheduler cannot hide each other's latency, so this loop is bound by its instructions
// before the tensor cores are: it has no branches, and its addresses are a register each.
#pragma once

// First channel of a thread, of 64.
__device__ __forceinline__ int channel_of(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

struct Addresses {  // of a thread, in stage 0
  uint32_t stage, barriers, words, tables;
  uint32_t tokens;  // a descriptor; of few tokens, the row that this lane gives to ldmatrix
  uint32_t ones;    // of look_up
};
__device__ __forceinline__ Addresses addresses(const Shared& s, int warpgroup, int thread) {
  const uint32_t weights = s.stages + kTokenBytes, tables = weights + kWeightBytes;
  const int block = channel_block(warpgroup), lane = thread % 32;
  const int channel = block * kGroups * 64 + channel_of(thread);
  return {s.stages,
          s.barriers,
          opaque(weights + block * kBlockBytes + thread * 16),
          opaque(tables + channel * 16),
          opaque(FEW_TOKENS ? s.stages + lane % 8 * 128 + (lane / 8 ^ lane % 8) * 16
                            : wgmma_descriptor_low(s.stages)),
          all_ones()};
}

#if BITS == 4
// Tables of a thread's two channels for one group.
__device__ __forceinline__ void load_tables(uint4& low, uint4& high, uint32_t at) {
#if FOLD
  low = load_shared(at);
  high = load_shared(at + 8 * 16);
#else
  low = high = identity_table();
#endif
}
#endif

// Lets a stage be filled again, by all blocks that fill it. `empty`: its barrier.
__device__ __forceinline__ void release(uint32_t empty) {
  const int lane = threadIdx.x % 32;
  if (SHARE == 1) {
    if (lane == 0) barrier_arrive(empty);
  } else if (lane < SHARE) {
    barrier_arrive_at(empty, lane);
  }
}

#if !FOLD
__device__ __forceinline__ int load_scale(uint32_t address) {
  int v;
  asm volatile("ld.shared.s16 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
// acc += S * partial for one group, S at its two channels. Returns 0, when the scales have been
// read: see `multiply`.
__device__ __forceinline__ uint32_t add_group(Accumulator (&acc)[kAccumulators],
                                              const int (&partial)[kAccumulators],
                                              uint32_t scales) {
  const int low = load_scale(scales), high = load_scale(scales + 8 * 2);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    acc[i] += Accumulator(i % 4 < 2 ? low : high) * Accumulator(partial[i]);
  }
  return (uint32_t(low + 32768) | uint32_t(high + 32768)) >> 16;
}
#endif

#if FEW_TOKENS
#include "sm90_multiply_few.cuh"
#else
struct Operands {           // of a thread
  uint32_t a[2][BATCH][4];  // unpacked: one set is multiplied while the other is made
#if BITS == 4
  uint32_t words[8];  // of a stage, two a k-step: the first channel's nibbles, the second's
  uint4 low, high;    // tables of the two channels, for the group at hand
#endif
};

// Waits for a stage, and loads its words and the tables of its first group; 8-bit weights `unpack`
// loads, straight into the operands. Returns the stage's barriers.
__device__ __forceinline__ uint32_t load_weights(Operands& v, const Addresses& from,
                                                 const Ring& ring) {
  const uint32_t barriers = from.barriers + ring.barriers();
  barrier_wait(barriers + kReady, ring.parity);
#if BITS == 4
  const uint4 v0 = load_shared(from.words + ring.offset);
  const uint4 v1 = load_shared(from.words + ring.offset + 2048);
  v.words[0] = v0.x, v.words[1] = v0.y, v.words[2] = v0.z, v.words[3] = v0.w;
  v.words[4] = v1.x, v.words[5] = v1.y, v.words[6] = v1.z, v.words[7] = v1.w;
  load_tables(v.low, v.high, from.tables + ring.offset);
#endif
  return barriers;
}

// Makes the operands of BATCH k-steps from `first` on, of the stage at `ring`.
__device__ __forceinline__ void unpack(Operands& v, const Addresses& from, const Ring& ring,
                                       int first) {
#pragma unroll
  for (int j = 0; j < BATCH; ++j) {
    const int step = first + j;
    uint32_t (&a)[4] = v.a[first / BATCH % 2][j];
#if BITS == 8
    const uint4 words = load_shared(from.words + ring.offset + step * 2048);
    a[0] = words.x, a[1] = words.y, a[2] = words.z, a[3] = words.w;
#else
    if (step > 0 && step * 32 % GROUP == 0) {
      load_tables(v.low, v.high, from.tables + ring.offset + step * 32 / GROUP * 64 * 16);
    }
    look_up(a[0], a[2], v.words[2 * step], v.low, from.ones);
    look_up(a[1], a[3], v.words[2 * step + 1], v.high, from.ones);
#endif
  }
}

// Where a warpgroup is in the ring.
struct Position {
  Ring ring;
  uint32_t barriers;  // of the stage at `ring`
  uint32_t previous;  // barriers of the stage before it, which is still being read
};

// Multiplies the stage at hand, whose first operands are unpacked, by `width` tokens, and moves on.
// `more`: the next stage follows, and its first operands are unpacked, too.
template <int width, bool more>
__device__ __forceinline__ void multiply_stage(Accumulator (&acc)[kAccumulators],
                                               int (&partial)[kAccumulators], Operands& v,
                                               const Addresses& from, Position& at, bool first) {
  using Part = int (&)[width / 2];
  const Ring now = at.ring;
  const uint32_t tokens = from.tokens + now.offset / 16;
  uint32_t read = 0;
#pragma unroll
  for (int step = 0; step < kSteps; step += BATCH) {
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < BATCH; ++j) {
      const uint64_t descriptor = wgmma_descriptor(tokens + 2 * (step + j));
      const uint32_t (&a)[4] = v.a[step / BATCH % 2][j];
#if FOLD
      wgmma_s8<width>(reinterpret_cast<Part>(acc[0]), a, descriptor,
                      !kCleared && first && step + j == 0);
#else
      wgmma_s8<width>(reinterpret_cast<Part>(partial[0]), a, descriptor,
                      (step + j) * 32 % GROUP == 0);
#endif
    }
    wgmma_commit();
    // The batch before has read its operands and, at step 0, its stage. In the last stage of the
    // accumulate form ptxas may move partial sums to other registers, which must not be in flight.
    wgmma_wait<FOLD || more ? 1 : 0>();
    if (step == 0) release(at.previous + kEmpty);
    if (step + BATCH < kSteps) {
      unpack(v, from, now, step + BATCH);
    } else if (more) {
      unpack(v, from, at.ring, 0);
    }
    if (step + 2 * BATCH == kSteps) {  // all words of this stage are unpacked
      at.previous = at.barriers;
      at.ring.advance<SLICES>();
      if (more) at.barriers = load_weights(v, from, at.ring);
    }
#if !FOLD
    if ((step + BATCH) * 32 % GROUP == 0) {
      wgmma_wait<0>();
      const int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
      const uint32_t scales = from.stage + now.offset + kTokenBytes + warpgroup * kBlockBytes +
                              kCodeBytes + (step * 32 / GROUP * 64 + channel_of(thread)) * 2;
      read = add_group(acc, partial, scales);
    }
#endif
  }
  at.previous += read;
}

// acc <- the products of `stages` blocks of 128 k of one tile.
#if FEW_REGISTERS
// A thread has 32 registers beside its accumulators, and one set of operands: a warpgroup unpacks
// when its multiplications are done. The tensor cores have those of two others meanwhile.
__device__ __forceinline__ void multiply(Accumulator (&acc)[kAccumulators], const Shared& s,
                                         Ring& ring, int stages, int warpgroup, int thread,
                                         int rows) {
  // Two wgmma of 128 tokens: ptxas takes none of 256 in a kernel launched with 128 registers.
  using Half = int (&)[kAccumulators / 2];
  constexpr int kHalfOfTokens = kTokenBytes / 2 / 16;  // in a descriptor
  const Addresses from = addresses(s, warpgroup, thread);
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) acc[i] = 0;
  uint32_t previous = 0;  // barrier of the stage that is still being read
  barrier_wait(from.barriers + ring.barriers() + kReady, ring.parity);
  for (int i = 0; i < stages; ++i) {
    const Ring now = ring;
    const uint32_t words = from.words + now.offset, tables = from.tables + now.offset;
    uint4 low = load_shared(tables), high = load_shared(tables + 8 * 16);
    // ptxas serializes wgmma whose operands, of all in a loop's body, have no registers. Two have.
#pragma unroll 2
    for (int step = 0; step < kSteps; ++step) {
      const uint2 nibbles = load_shared_pair(words + step / 2 * 2048 + step % 2 * 8);
      if (step > 0 && step * 32 % GROUP == 0) {
        const uint32_t group = tables + step * 32 / GROUP * 64 * 16;
        low = load_shared(group), high = load_shared(group + 8 * 16);
      }
      wgmma_wait<0>();
      if (step == 0 && i > 0 && elect_one()) barrier_arrive(previous);
      uint32_t a[4];
      look_up(a[0], a[2], nibbles.x, low, from.ones);
      look_up(a[1], a[3], nibbles.y, high, from.ones);
      wgmma_fence();
      const uint32_t tokens = from.tokens + now.offset / 16 + 2 * step;
      wgmma_s8<TILE_M / 2>(reinterpret_cast<Half>(acc[0]), a, wgmma_descriptor(tokens), false);
      wgmma_s8<TILE_M / 2>(reinterpret_cast<Half>(acc[kAccumulators / 2]), a,
                           wgmma_descriptor(tokens + kHalfOfTokens), false);
      wgmma_commit();
    }
    previous = from.barriers + now.barriers() + kEmpty;
    ring.advance();
    if (i + 1 < stages) barrier_wait(from.barriers + ring.barriers() + kReady, ring.parity);
  }
  wgmma_wait<0>();
  if (elect_one()) barrier_arrive(previous);
}
#else
template <int width>
__device__ __forceinline__ void multiply_by(Accumulator (&acc)[kAccumulators], const Shared& s,
                                            Ring& ring, int stages, int warpgroup, int thread) {
  const Addresses from = addresses(s, warpgroup, thread);
  Operands v;
  int partial[kAccumulators];
  if (kCleared) {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) acc[i] = 0;
  }
  if (SLICES > 1 && stages == 0) return;
  Position at = {ring, load_weights(v, from, ring), s.unused - kEmpty};
  unpack(v, from, ring, 0);
  bool first = true;
  for (int left = stages; left > 1; --left) {
    multiply_stage<width, true>(acc, partial, v, from, at, first);
    first = false;
  }
  multiply_stage<width, false>(acc, partial, v, from, at, first);
  wgmma_wait<0>();
  // An arrival overtakes loads that queue behind stores of other warps. In the loop, and for the
  // words, what is loaded is needed before; for scales, the address depends on them.
  release(at.previous + kEmpty);
  ring = at.ring;
}

// By the first width that holds the rows.
template <int width = NARROWEST>
__device__ __forceinline__ void multiply(Accumulator (&acc)[kAccumulators], const Shared& s,
                                         Ring& ring, int stages, int warpgroup, int thread,
                                         int rows) {
  if constexpr (width < TILE_M) {
    if (rows > width) {
      return multiply<width + STEP>(acc, s, ring, stages, warpgroup, thread, rows);
    }
  }
  multiply_by<width>(acc, s, ring, stages, warpgroup, thread);
}
#endif  // FEW_REGISTERS
#endif  // FEW_TOKENS
