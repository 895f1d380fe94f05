// Part of sm90_w4a8_gemm.cu: the last warpgroup, which fills the stages that the others multiply.
// One warp loads, three build tables.
#pragma once

// ---- load warp ---------------------------------------------------------------------------------

// The blocks of weights of a tile, which lie in pairs (k_blocks pairs in a row): where pairs are
// split between tiles, each block is a copy of its own.
constexpr int kCopies = kChannelBlocks % 2 == 0 ? kChannelBlocks / 2 : kChannelBlocks;
constexpr int kCopyBlocks = kChannelBlocks / kCopies;

// Tokens of a stage. Blocks that share them copy a part each, to all.
__device__ __forceinline__ void copy_tokens(uint32_t stage, const int8_t* tokens, int bytes,
                                            uint32_t full, uint64_t policy) {
  constexpr int kPart = kTokenBytes / SHARE;
  const int begin = blockIdx.x % SHARE * kPart, part = min(kPart, bytes - begin);
  if (SHARE == 1) {
    bulk_copy(stage, tokens, bytes, full, policy);
  } else if (part > 0) {
    bulk_copy_to_cluster<(1 << SHARE) - 1>(stage + begin, tokens + begin, part, full, policy);
  }
}

// What the block `follower` places before this one left of a tile, to as many stages as it takes.
__device__ __forceinline__ void load_partial(const Problem& p, const Shared& s, Ring& ring,
                                             int follower, bool leader, uint64_t policy) {
  constexpr int kBytes = kPartialBlocks * 128 * 16;
  const int block = blockIdx.x - SHARE * follower, lane = threadIdx.x % 32;
  if (lane < WARPGROUPS) await_and_lower_flag(flag_of(p, block, lane));
  __syncwarp();
  bulk_copies_see_memory();
  for (int j = 0; j < kTokenBlocks; j += kPartialBlocks) {
    const uint32_t at = s.stages + ring.offset, barriers = s.barriers + ring.barriers();
    barrier_wait(barriers + kEmpty, ring.parity ^ 1);
    if (leader) {
      if (TABLES) barrier_arrive(barriers + kReady);  // as if for tokens
      barrier_expect(barriers + kFull, WARPGROUPS * kBytes);
      for (int i = 0; i < WARPGROUPS; ++i) {
        bulk_copy(at + i * kBytes, partial_of(p, block, i) + j * 128, kBytes, barriers + kFull,
                  policy);
      }
    }
    ring.advance();
  }
}

// Pointers are carried along: what this warp computes between an empty stage and its copies is
// latency for all the others.
__device__ __forceinline__ void load(const Problem& p, const Shared& s, Schedule todo) {
  constexpr int kPairBytes = 2 * kBlockBytes, kCopyBytes = kCopyBlocks * kBlockBytes;
  const bool leader = elect_one();
  const uint64_t token_policy = read_again();
  const uint64_t lone_policy = GROUPED || p.m_pad <= TILE_M ? read_once() : token_policy;
  const int64_t token_step = int64_t(p.m_pad) * kStageK;
  Ring ring;
  Piece piece;
  for (int number = 0;; ++number) {
    if (!todo.take(piece)) piece.k_count = 0;
    announce(s, number, piece);
    if (piece.k_count == 0) break;
    const Tile t = piece.tile;
    const uint64_t weight_policy = t.alone ? lone_policy : token_policy;
    const int tokens_to = GROUPED ? (t.m_end + 7) / 8 * 8 : p.m_pad;
    const int token_bytes = min(TILE_M, tokens_to - t.m0) * kStageK;
    const int64_t expert_at = int64_t(t.expert) * ((p.n + 127) / 128) * p.k_blocks * kPairBytes;
    const uint8_t* weights[kCopies];
    int copies = 0;  // a tile may end before its last block; a cluster, before this block of it
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int block = t.n0 / 64 + i * kCopyBlocks;
      const int64_t pair = int64_t(block / 2) * p.k_blocks + piece.k_begin;
      weights[i] = p.weight + expert_at + pair * kPairBytes + block % 2 * kBlockBytes;
      copies += block / 2 * 128 < p.n;
    }
    const int8_t* tokens = p.a8 + piece.k_begin * token_step + t.m0 * kStageK;
    const auto load_weights = [&](uint32_t stage, uint32_t barriers) {
      const int full_bytes = copies * kCopyBytes + (TABLES ? 0 : token_bytes);
      if (leader) barrier_expect(barriers + kFull, full_bytes);
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (leader && ((SHARE == 1 && i == 0) || i < copies)) {
          bulk_copy(stage + kTokenBytes + i * kCopyBytes, weights[i], kCopyBytes, barriers + kFull,
                    weight_policy);
        }
        weights[i] += kPairBytes;
      }
    };
    const auto load_tokens = [&](uint32_t stage, uint32_t barriers) {
      if (leader) {
        if (TABLES) barrier_expect(barriers + kReady, token_bytes);
        copy_tokens(stage, tokens, token_bytes, barriers + kReady, token_policy);
      }
      tokens += token_step;
    };
    int k = 0;
    if (number == 0) {  // weights of the first stages need not wait for the kernel before
#pragma unroll 1
      for (; k < min(STAGES, piece.k_count); ++k) {
        load_weights(s.stages + k * kStageBytes, s.barriers + k * kStageBytes / 128);
      }
      wait_for_previous_kernel();
#pragma unroll 1
      for (int i = 0; i < k; ++i) {
        load_tokens(s.stages + ring.offset, s.barriers + ring.barriers());
        ring.advance();
      }
    }
#pragma unroll 1
    for (; k < piece.k_count; ++k) {
      const uint32_t stage = s.stages + ring.offset, barriers = s.barriers + ring.barriers();
      barrier_wait(barriers + kEmpty, ring.parity ^ 1);
      load_weights(stage, barriers);
      load_tokens(stage, barriers);
      ring.advance();
    }
    for (int i = 1; i <= piece.followers; ++i) load_partial(p, s, ring, i, leader, read_once());
  }
}

// ---- table warps -------------------------------------------------------------------------------

// Warp `turn` of them builds the tables of every third stage, two channels a lane and block.
__device__ __forceinline__ void build_tables(const Problem& p, const Shared& s, int turn,
                                             int lane) {
  const Constants c = constants();
  Ring ring;
  Piece piece;
  for (int number = 0; receive(p, s, number, piece); ++number) {
    received(s, number, piece);
    const Tile t = piece.tile;
    const int64_t padded_n = (p.n + 127) / 128 * 128;
    const float* units = p.unit + t.expert * padded_n;
    float unit[kChannelBlocks][2];
#pragma unroll
    for (int i = 0; i < kChannelBlocks * 2; ++i) {
      const int channel = t.n0 + i / 2 * 64 + lane * 2 + i % 2;
      unit[i / 2][i % 2] = channel < padded_n ? units[channel] : 0.0f;
    }
    for (int k = 0; k < piece.k_count; ++k) {
      const uint32_t weights = s.stages + ring.offset + kTokenBytes;
      const uint32_t barriers = s.barriers + ring.barriers();
      barrier_wait(barriers + kFull, ring.parity);
      if (turn == 0) {
#pragma unroll
        for (int block = 0; block < kChannelBlocks; ++block) {
#pragma unroll
          for (int group = 0; group < kGroups; ++group) {
            const uint32_t fields = load_shared_word(weights + block * kBlockBytes + kCodeBytes +
                                                     group * 128 + lane * 4);
            const uint32_t tables =
                weights + kWeightBytes + ((block * kGroups + group) * 64 + lane * 2) * 16;
            store_shared(tables, build_table(fields & 0xffff, unit[block][0], c));
            store_shared(tables + 16, build_table(fields >> 16, unit[block][1], c));
          }
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers + kReady);
      }
      turn = turn == 0 ? kTableWarps - 1 : turn - 1;
      ring.advance();
    }
    // Stages with partial sums need no tables.
    for (int k = 0; k < piece.followers * (kTokenBlocks / kPartialBlocks); ++k) {
      const uint32_t barriers = s.barriers + ring.barriers();
      barrier_wait(barriers + kFull, ring.parity);
      if (turn == 0 && lane == 0) barrier_arrive(barriers + kReady);
      turn = turn == 0 ? kTableWarps - 1 : turn - 1;
      ring.advance();
    }
  }
}
