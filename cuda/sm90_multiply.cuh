// Part of sm90_w4a8_gemm.cu: the main loop of a multiplying warpgroup, stages to accumulators.
#pragma once

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
