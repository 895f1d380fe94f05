// Part of sm90_w4a8_gemm.cu: the last warpgroup, which fills the stages that the others multiply.
// One warp loads, three build tables.
#pragma once

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
