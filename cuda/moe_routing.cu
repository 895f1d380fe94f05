// Gives the rows of experts their places for the grouped GEMMs. One block, any number of tokens.
//
// A slot is one (token, choice) pair, slot = token * topk + choice. Rows of one local expert lie
// together among the grouped activations, from a multiple of 8 on (common.cuh says why), and tiles
// of up to tile_m of them read one expert's weights:
//
//   rows        | e0 e0 e0 .. | e2 e2 e2 e2 e2 e2 e2 e2 | e2 e2 e2 .. |      tile_m = 8
//   tiles       |      0      |            1            |      2      |
//
//   slot_row    int [slots]   the slot's row; -1: its expert is not local, or its id is -1
//   tiles       int4 [...]    expert, first row, rows, and its group: 256 * first tile + tiles
//   tile_count  int           how many tiles are in use
//
// A group is up to kGroupTiles tiles of one expert, which a GEMM multiplies by the same weights one
// right after the other. Which slot of an expert has which row is arbitrary: rows of a GEMM do not
// touch each other. expert_map (global id -> local or -1) may be nullptr. Dynamic shared memory:
// 3 * experts ints.
#include "common.cuh"

constexpr int kThreads = 1024, kGroupTiles = 16;

// Sum over this lane and those before it.
__device__ __forceinline__ int sum_up_to_lane(int value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(0xffffffff, value, distance);
    if (int(threadIdx.x % 32) >= distance) value += before;
  }
  return value;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    group_rows(const int* topk_ids, const int* expert_map, int* slot_row, int4* tiles,
               int* tile_count, int slots, int experts, int tile_m) {
  extern __shared__ int shared[];
  int* count = shared;                     // rows of each expert
  int* next_row = shared + experts;        // where its next row goes
  int* first_tile = shared + 2 * experts;  // of its own
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int e = threadIdx.x; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
    int expert = topk_ids[slot];
    if (expert >= 0 && expert_map != nullptr) expert = expert_map[expert];
    slot_row[slot] = expert;  // until the rows are known
    if (expert >= 0) atomicAdd(&count[expert], 1);
  }
  __syncthreads();
  if (warp == 0) {
    int rows = 0, tiles_used = 0;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane, own = e < experts ? count[e] : 0;
      const int own_rows = (own + 7) / 8 * 8, own_tiles = (own + tile_m - 1) / tile_m;
      const int rows_to = sum_up_to_lane(own_rows), tiles_to = sum_up_to_lane(own_tiles);
      if (e < experts) {
        next_row[e] = rows + rows_to - own_rows;
        first_tile[e] = tiles_used + tiles_to - own_tiles;
      }
      rows += __shfl_sync(0xffffffff, rows_to, 31);
      tiles_used += __shfl_sync(0xffffffff, tiles_to, 31);
    }
    if (lane == 0) *tile_count = tiles_used;
  }
  __syncthreads();
  for (int e = warp; e < experts; e += kThreads / 32) {
    const int own_tiles = (count[e] + tile_m - 1) / tile_m, first = first_tile[e];
    for (int i = lane; i < own_tiles; i += 32) {
      const int group = i / kGroupTiles * kGroupTiles,
                of_group = min(kGroupTiles, own_tiles - group);
      tiles[first + i] = make_int4(e, next_row[e] + i * tile_m, min(tile_m, count[e] - i * tile_m),
                                   256 * (first + group) + of_group);
    }
  }
  __syncthreads();
  for (int slot = threadIdx.x; slot < slots; slot += kThreads) {
    const int expert = slot_row[slot];
    if (expert >= 0) slot_row[slot] = atomicAdd(&next_row[expert], 1);
  }
}
