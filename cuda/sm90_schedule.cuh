// Part of sm90_w4a8_gemm.cu: which tiles, and which of their k, a block computes.
//
//   clusters   one tile each; its blocks share the k evenly and add in shared memory
//   whole      without clusters: block b takes tiles b, b + grid, ... below whole_tiles
//   streamed   the k of the tiles from whole_tiles on is laid end to end and cut evenly:
//
//     tile           |------ t ------|---- t + 1 ----|---- t + 2 ----|
//     block     ... 3    |     2     |     1     |     0     |
//
//              A block that begins inside a tile leaves that piece's sums in global memory first,
//              and the one that began the tile collects them, last. It waits for blocks before it
//              in the grid only, which started earlier, so that no block waits for one that needs
//              its place.
//              Experts: how many tiles there are only the device knows. The last whole wave and the
//              ragged one after it are streamed where that one would leave blocks idle for more
//              than `least_idle` blocks of k on average, times the whole waves: in a longer GEMM
//              blocks out of step in k cost more of what L2 holds, and win less.
#pragma once

// Clusters of a launch with SHARE > 1 are neither: they take what is a tile of SHARE times as many
// channels here, and each of their blocks one of the neighbours, all of its k.
__device__ __forceinline__ int split_size() { return SHARE > 1 ? 1 : cluster_size(); }
__device__ __forceinline__ int split_rank() { return SHARE > 1 ? 0 : cluster_rank(); }
constexpr int kClusterN = 64 * kChannelBlocks * SHARE;

__device__ __forceinline__ int tiles_along_n(const Problem& p) {
  return (p.n + kClusterN - 1) / kClusterN;
}
__device__ __forceinline__ int tiles_along_m(const Problem& p) {
  return (p.m_pad + TILE_M - 1) / TILE_M;
}

struct Tile {
  int n0, m0, m_end;  // first channel (of this block), first token, end of the tokens
  int expert;
#if GROUPED
  bool alone;  // no other tile is multiplied by the same weights
#else
  static constexpr bool alone = true;
#endif
};
struct Piece {  // what a block computes of a tile
  Tile tile;
  int k_begin, k_count;  // in blocks of 128
  int followers;         // blocks whose sums are to be added; kLeft: the sums are left to another
};
constexpr int kLeft = -1;

// Tiles of the same channels follow each other, but only over as many tokens as the L2 cache keeps
// until the next channels are multiplied.
__device__ __forceinline__ Tile tile_at(const Problem& p, int index) {
#if GROUPED  // the same for the tiles of a group; from L2, see moe_routing.cu
  const int along_n = tiles_along_n(p), group = __ldcg(p.tiles + index / along_n).w;
  const int first = group >> 8, count = group & 255, at = index - first * along_n;
  const int4 tile = __ldcg(p.tiles + first + at % count);
  const int n0 = at / count * kClusterN + blockIdx.x % SHARE * 64 * kChannelBlocks;
  return {n0, tile.y, tile.y + tile.z, tile.x, count == 1};
#else
  constexpr int kGroup = 4096 / TILE_M;
  const int of_group = tiles_along_n(p) * kGroup, m_first = index / of_group * kGroup;
  const int m_count = min(kGroup, tiles_along_m(p) - m_first), at = index % of_group;
  const int n0 = at / m_count * kClusterN + blockIdx.x % SHARE * 64 * kChannelBlocks;
  return {n0, (m_first + at % m_count) * TILE_M, p.m, 0};
#endif
}

// Only the load warp follows it, and tells the others (announce, receive).
struct Schedule {
  const Problem& p;
  const int expert_tiles, whole_tiles;
  int next;  // tile to take whole; or ~x, x blocks of k after the start of tile whole_tiles

  __device__ __forceinline__ explicit Schedule(const Problem& p)
      : p(p),
        expert_tiles(GROUPED ? __ldcg(p.tile_count) * tiles_along_n(p) : 0),
        whole_tiles(GROUPED ? whole_expert_tiles() : p.whole_tiles),
        next(cluster()) {}

  __device__ __forceinline__ int cluster() const { return blockIdx.x / cluster_size(); }
  __device__ __forceinline__ int clusters() const { return gridDim.x / cluster_size(); }

  __device__ __forceinline__ int whole_expert_tiles() const {
    const int waves = expert_tiles / clusters(), ragged = expert_tiles % clusters();
    const int idle = (clusters() - ragged) * p.k_blocks;  // in the last wave, all together
    const bool stream = p.partials != nullptr && waves > 0 && ragged > 0;
    return stream && idle > p.least_idle * waves * clusters() ? (waves - 1) * clusters()
                                                              : expert_tiles;
  }

  __device__ __forceinline__ bool take(Piece& piece) {
    if (next >= 0 && next < whole_tiles) {
      const int size = split_size(), rank = split_rank();
      const int k_begin = p.k_blocks * rank / size;
      piece = {tile_at(p, next), k_begin, p.k_blocks * (rank + 1) / size - k_begin, 0};
      next += clusters();
      return true;
    }
    if (streamed() == 0) return false;
    if (next >= 0) next = ~begin_of(clusters() - 1 - cluster());
    const int at = ~next, end = begin_of(clusters() - cluster());
    if (at >= end) return false;
    const int tile = whole_tiles + at / p.k_blocks, k_begin = at % p.k_blocks;
    const int k_count = min(p.k_blocks - k_begin, end - at);
    const int followers = k_begin > 0 ? kLeft : k_count < p.k_blocks ? followers_of(tile) : 0;
    piece = {tile_at(p, tile), k_begin, k_count, followers};
    next = ~(at + k_count);
    return true;
  }
  __device__ __forceinline__ int streamed() const {  // blocks of k
    const int tiles = GROUPED ? expert_tiles : tiles_along_n(p) * tiles_along_m(p);
    return (tiles - whole_tiles) * p.k_blocks;
  }
  // Where the share of a cluster begins that is the i-th from the last.
  __device__ __forceinline__ int begin_of(uint32_t i) const {
    return uint32_t(streamed()) * i / uint32_t(clusters());
  }
  // How many clusters after this one work on the tile that its share ends in.
  __device__ __forceinline__ int followers_of(int tile) const {
    const int tile_end = (tile - whole_tiles + 1) * p.k_blocks;
    const int own = clusters() - 1 - cluster();
    int count = 0;
    while (begin_of(own + count + 1) < tile_end) ++count;
    return count;
  }
};

// What a block leaves: partials [block of the grid][warpgroup][16 bytes of a thread][thread], and
// a flag for each warpgroup, raised.
__device__ __forceinline__ int* flag_of(const Problem& p, int block, int warpgroup) {
  int8_t* flags = const_cast<int8_t*>(p.a8) + int64_t(p.k_blocks) * p.m_pad * kStageK;
  return reinterpret_cast<int*>(flags) + block * WARPGROUPS + warpgroup;
}
__device__ __forceinline__ int4* partial_of(const Problem& p, int block, int warpgroup) {
  return p.partials + int64_t(block * WARPGROUPS + warpgroup) * kTokenBlocks * 128;
}
