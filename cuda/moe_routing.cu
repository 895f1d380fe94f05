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
// What follows may overlap (activation.cu, sm90_w4a8_gemm.cu): everything before this kernel has
// ended once the next one starts, and this kernel has ended once the one after the next starts. So
// the quantizer reads its input early, and a GEMM reads tiles and weights early.
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
  int* first_row = shared + experts;       // of its rows
  int* first_tile = shared + 2 * experts;  // of its own
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto expert_of = [&](int slot) {
    const int expert = topk_ids[slot];
    return expert >= 0 && expert_map != nullptr ? expert_map[expert] : expert;
  };
  const auto take_place = [&](int expert) {
    return expert < 0 ? -1 : atomicAdd(count + expert, 1);
  };
  for (int e = threadIdx.x; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();
  // A thread's first slot stays in registers; of the others slot_row keeps the place meanwhile.
  const int own_slot = threadIdx.x, own_expert = own_slot < slots ? expert_of(own_slot) : -1;
  const int own_place = take_place(own_expert);
  for (int slot = own_slot + kThreads; slot < slots; slot += kThreads) {
    slot_row[slot] = take_place(expert_of(slot));
  }
  __syncthreads();
  if (warp == 0) {
    int rows = 0, tiles_used = 0;
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane, own = e < experts ? count[e] : 0;
      const int own_rows = (own + 7) / 8 * 8, own_tiles = (own + tile_m - 1) / tile_m;
      const int rows_to = sum_up_to_lane(own_rows), tiles_to = sum_up_to_lane(own_tiles);
      if (e < experts) {
        first_row[e] = rows + rows_to - own_rows;
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
      const int rows = min(tile_m, count[e] - i * tile_m);
      tiles[first + i] =
          make_int4(e, first_row[e] + i * tile_m, rows, 256 * (first + group) + of_group);
    }
  }
  if (own_slot < slots)
    slot_row[own_slot] = own_expert < 0 ? -1 : first_row[own_expert] + own_place;
  for (int slot = own_slot + kThreads; slot < slots; slot += kThreads) {
    if (slot_row[slot] >= 0) slot_row[slot] += first_row[expert_of(slot)];
  }
}
