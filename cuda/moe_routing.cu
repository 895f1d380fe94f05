// Groups expert slots for the grouped GEMM. One block, any number of tokens and experts.
//
// A slot is one (token, choice) pair, slot = token * topk + choice. Slots of the same local expert
// are listed together, each expert's list padded with -1 to a multiple of tile_m, so that one tile
// of tokens reads one expert's weights:
//
//   sorted_slots   | e0 e0 e0 -1 | e2 e2 e2 e2 | e2 -1 -1 -1 | ...       tile_m = 4
//   tile_expert    |     0       |     2       |     2       | ...
//   slot_expert    local expert of each slot, or -1 (id -1, or not on this rank)
//   tile_count     number of tiles in use
//
// The order of slots within an expert is arbitrary: rows of a GEMM do not touch each other.
// Dynamic shared memory: 2 * experts ints. expert_map (global id -> local or -1) may be nullptr.
#include "common.cuh"

constexpr int kThreads = 1024;

extern "C" __global__ void __launch_bounds__(kThreads)
    group_slots(const int* topk_ids, const int* expert_map, int* sorted_slots, int* tile_expert,
                int* slot_expert, int* tile_count, int64_t slots, int64_t experts, int64_t tile_m) {
  extern __shared__ int shared[];
  int* count = shared;           // slots of each expert
  int* next = shared + experts;  // where its next slot goes
  for (int64_t e = threadIdx.x; e < experts; e += kThreads) count[e] = 0;
  __syncthreads();
  for (int64_t slot = threadIdx.x; slot < slots; slot += kThreads) {
    int expert = topk_ids[slot];
    if (expert >= 0 && expert_map != nullptr) expert = expert_map[expert];
    slot_expert[slot] = expert;
    if (expert >= 0) atomicAdd(&count[expert], 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {  // at most a few hundred experts
    int tile = 0;
    for (int64_t e = 0; e < experts; ++e) {
      next[e] = tile * int(tile_m);
      for (int i = 0; i < count[e]; i += int(tile_m)) tile_expert[tile++] = int(e);
    }
    *tile_count = tile;
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < experts; e += kThreads) {
    const int end = next[e] + (count[e] + int(tile_m) - 1) / int(tile_m) * int(tile_m);
    for (int i = next[e] + count[e]; i < end; ++i) sorted_slots[i] = -1;
  }
  __syncthreads();
  for (int64_t slot = threadIdx.x; slot < slots; slot += kThreads) {
    const int expert = slot_expert[slot];
    if (expert >= 0) sorted_slots[atomicAdd(&next[expert], 1)] = int(slot);
  }
}
