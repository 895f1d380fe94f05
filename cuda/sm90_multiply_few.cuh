// Part of sm90_w4a8_gemm.cu: the main loop of a multiplying warp for tiles of 8 tokens, on
// mma.sync.
//
// wgmma has the four warps of a warpgroup wait for each other and for its sums, which so few tokens
// do not pay for. Here every warp goes at its own pace, and reads a stage while it multiplies the
// one before. Lanes hold the same channels, tokens and sums as with wgmma.
#pragma once
static_assert(FEW_TOKENS && SHARE == 1 && SLICES == 1);

struct Operands {                    // of a thread, of a stage
  uint32_t words[kSteps][BITS / 2];  // BITS=4: nibbles of its two channels; else int8 operands
  uint32_t tokens[kSteps / 2][4];    // k-steps 2 i and 2 i + 1: k 4 t.. and 16 + 4 t.. of token g
#if BITS == 4
  uint4 low, high;  // tables of the two channels, for the group at hand
#endif
  uint32_t offset, barriers;  // of the stage
};

// Waits for the stage at `ring`, reads it, and moves on.
__device__ __forceinline__ void load_stage(Operands& v, const Addresses& from, Ring& ring) {
  v.offset = ring.offset, v.barriers = from.barriers + ring.barriers();
  barrier_wait(v.barriers + kReady, ring.parity);
#pragma unroll
  for (int i = 0; i < kSteps * BITS / 8; ++i) {
    const uint4 words = load_shared(from.words + ring.offset + i * 2048);
    uint32_t* const to = &v.words[0][0] + 4 * i;
    to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
  }
#if BITS == 4
  load_tables(v.low, v.high, from.tables + ring.offset);
#endif
  load_matrix_x4(v.tokens[0], from.tokens + ring.offset);
  load_matrix_x4(v.tokens[1], (from.tokens ^ 64) + ring.offset);  // four swizzled chunks further
  ring.advance();
}

// Of even and odd k-steps: neither waits for the other.
using Sums = int[2][kAccumulators];

__device__ __forceinline__ void multiply_step(Sums& sums, const Operands& v, int step,
                                              uint32_t ones) {
  uint32_t a[4];
#if BITS == 4
  look_up(a[0], a[2], v.words[step][0], v.low, ones);
  look_up(a[1], a[3], v.words[step][1], v.high, ones);
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = v.words[step][i];
#endif
  const uint32_t* const tokens = v.tokens[step / 2] + step % 2 * 2;
  int (&sum)[kAccumulators] = sums[step % 2];
  mma_s8(sum, a, tokens[0], tokens[1], sum[0], sum[1], sum[2], sum[3]);
}
__device__ __forceinline__ void take(int (&total)[kAccumulators], Sums& sums) {
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) {
    total[i] = sums[0][i] + sums[1][i];
    sums[0][i] = sums[1][i] = 0;
  }
}

// Multiplies a stage that has been loaded, and lets it be filled again. scales: of the accumulate
// form, in stage 0. zero: 0, which ptxas does not know.
__device__ __forceinline__ void multiply_stage(Accumulator (&acc)[kAccumulators], Sums& sums,
                                               Operands& v, const Addresses& from, uint32_t scales,
                                               uint32_t zero) {
  uint32_t last = v.tokens[kSteps / 2 - 1][3];  // of what is read of the stage
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#if BITS == 4
    if (step > 0 && step * 32 % GROUP == 0) {
      load_tables(v.low, v.high, from.tables + v.offset + step * 32 / GROUP * 64 * 16);
      last = v.high.w;
    }
#endif
    multiply_step(sums, v, step, from.ones);
#if !FOLD
    if ((step + 1) * 32 % GROUP == 0) {
      int partial[kAccumulators];
      take(partial, sums);
      last = add_group(acc, partial, scales + v.offset + step * 32 / GROUP * 64 * 2);
    }
#endif
  }
  release(v.barriers + kEmpty + (last & zero));  // an arrival overtakes loads
}

// acc <- the products of `stages` blocks of 128 k of one tile.
__device__ __forceinline__ void multiply(Accumulator (&acc)[kAccumulators], const Shared& s,
                                         Ring& ring, int stages, int warpgroup, int thread, int) {
  const Addresses from = addresses(s, warpgroup, thread);
  const uint32_t scales =
      s.stages + kTokenBytes + warpgroup * kBlockBytes + kCodeBytes + channel_of(thread) * 2;
  const uint32_t zero = opaque(s.stages >> 31);
  Operands v[2];
  Sums sums = {};
#pragma unroll
  for (int i = 0; i < kAccumulators; ++i) acc[i] = 0;
  load_stage(v[0], from, ring);
  int left = stages;
#pragma unroll 1
  for (; left > 2; left -= 2) {  // without other branches, which ptxas moves nothing across
    load_stage(v[1], from, ring);
    multiply_stage(acc, sums, v[0], from, scales, zero);
    load_stage(v[0], from, ring);
    multiply_stage(acc, sums, v[1], from, scales, zero);
  }
  if (left == 2) load_stage(v[1], from, ring);
  multiply_stage(acc, sums, v[0], from, scales, zero);
  if (left == 2) multiply_stage(acc, sums, v[1], from, scales, zero);
#if FOLD
  take(acc, sums);
#endif
}
