// W4A8 GEMM with integer group scales on Hopper: wgmma (mma.sync where a tile has 8 tokens), bulk
// copies, warp specialization.
//
//   FOLD=1   out[m, n] = float(sum_k a8[m, k] * w8[n, k]) * channel_scale[n] * token_scale[m]
//                        + bias[n],  w8 of fold.cuh       (reference.fold, then reference.gemm)
//   BITS=8   the same, with w8 in the weight as they are: 8-bit layers, folded on the host
//   FOLD=0   the same with sum_g S[n, g] * sum_{k in g} a8[m, k] * w4[n, k]    (reference.gemm)
//
// Contract (bit-identical to the reference)
//   a8            int8, the layout of common.cuh, m_pad rows (m rounded up to 8), and its flags
//   token_scale   float32 [m]
//   weight        blocks of 64 channels x 128 k, [ceil(n / 128)][ceil(k / 128)][2][block], as below
//   unit          float32 [n rounded up to 128], 127 / m of fold.cuh (else: not read)
//   channel_scale float32 [n];  bias DTYPE [n] or nullptr
//   out           DTYPE [m, n rounded up to 8]; with -DDTYPE=INT32 the accumulators
//   partials      int32 [blocks of the grid][tile], scratch; read if tiles are streamed
//   grid          clusters of 1 to 8 blocks of 128 * (WARPGROUPS + 1) threads. A tile is TILE_M
//                 tokens x 64 * WARPGROUPS / SLICES channels; who computes which:
//                 sm90_schedule.cuh. With SHARE=2 clusters are two blocks, neighbours in n, that
//                 load their tokens together. With SLICES=2 two warpgroups multiply the stages of
//                 the same channels in turn; grid: a block for each tile
//   With -DGROUPED=1 tiles of tokens are those of moe_routing.cu, weight, unit and channel_scale
//   have a leading expert dimension, bias is nullptr; grid: enough clusters for any routing if more
//   than one block shares a tile's k or slices do. Tiles may be streamed if there are partials. A
//   tile with few rows is multiplied by as few tokens as hold them, of NARROWEST, NARROWEST + STEP,
//   ... TILE_M.
//
//   May be launched to overlap the kernels before
//   (the quantizer overlaps, too): weights load first, a8 once they are done. So none of them may
//   write the weights.
//
// A block of weights is what one warpgroup multiplies at a time, as the A operand (m64n*k32, or
// m16n8k32 of each warp, in registers): warp w, lane 4 g + t holds channels 16 w + g ("first") and
// 16 w + g + 8 ("second").
//
//   [2 halves][128 threads][4 words]  words of half h: k-step 2 h first, 2 h second, 2 h + 1 first,
//                                     2 h + 1 second; a word is nibbles of k + 4 t + 0..3, then of
//                                     k + 16 + 4 t + 0..3 (codes: fold.cuh)
//   [128 / GROUP][64] uint16          the scales: fields of fold.cuh (FOLD=0: S as int16)
//
// With BITS=8 it is [4 k-steps][128 threads][4 words]: registers of the operand, w8 of
// k + 4 t + 0..3 first, second, of k + 16 + 4 t + 0..3 first, second. No scales.
//
// One stage of shared memory is 128 k of a tile:
//
//   tokens [TILE_M][128]    the B operand, swizzled as it lies in global memory
//   weights [kChannelBlocks][block], tables [kChannelBlocks][128 / GROUP][64][16] (TABLES)
//
//     load warp --weights: full--> table warps (3) --ready--> multiplying warpgroups --empty-->
//               --tokens--------------------------> ready     (the load warp)
//
// Tables are built while the kernel before still makes the tokens. Without tables the multipliers
// wait for `full` themselves, which is of tokens, too. Which tile comes next only the load warp
// works out, and announces it to the others.
#include "common.cuh"
#include "fold.cuh"
#include "hopper.cuh"

// Three warpgroups of 128 accumulators a thread: 160 registers, one set of operands.
#define FEW_REGISTERS (TILE_M == 256 && WARPGROUPS == 3)
#define FEW_TOKENS (TILE_M == 8)  // multiplied by mma.sync
#define TABLES (FOLD && BITS == 4)
constexpr int kThreads = 128 * (WARPGROUPS + 1);  // the last warpgroup loads and builds tables
constexpr int kMultipliers = 128 * WARPGROUPS;
constexpr int kChannelBlocks = WARPGROUPS / SLICES;  // of 64 channels, of a tile
constexpr int kTableWarps = 3;
constexpr int kStageK = 128;
constexpr int kGroups = BITS == 4 ? kStageK / GROUP : 0;  // that have scales
constexpr int kSteps = kStageK / 32;
constexpr int kCodeBytes = 64 * kStageK * BITS / 8;
constexpr int kBlockBytes = kCodeBytes + kGroups * 64 * 2;
constexpr int kWeightBytes = kChannelBlocks * kBlockBytes;
constexpr int kTokenBytes = TILE_M * kStageK;
constexpr int kTableBytes = TABLES ? kChannelBlocks * kGroups * 64 * 16 : 0;
constexpr int kStageBytes = kTokenBytes + (kWeightBytes + kTableBytes + 1023) / 1024 * 1024;
constexpr int kFull = 0, kReady = TABLES ? 8 : kFull, kEmpty = 16;  // barriers, see Ring
constexpr int kTokenBlocks = TILE_M / 8;  // a thread holds 2 channels x 2 tokens of each
constexpr int kAccumulators = TILE_M / 2;
// Whether accumulators are cleared before a tile, not by its first multiplication.
constexpr bool kCleared = !FOLD || SLICES > 1 || NARROWEST < TILE_M || TILE_M <= 64;
// What is written at a time: a unit of two blocks of 8 tokens, or of one where there is no more.
constexpr int kUnitBlocks = kTokenBlocks < 2 ? 1 : 2;
constexpr int kUnits = kTokenBlocks / kUnitBlocks;
constexpr int kStagingBytes = WARPGROUPS * 2 * kUnitBlocks * 8 * 128;
constexpr int kScaleTokens = TILE_M < 16 ? 16 : TILE_M;
constexpr int kScaleBytes = WARPGROUPS * kScaleTokens * 4;  // a copy for each warpgroup
// Blocks of 8 tokens whose partial sums, of all warpgroups, a stage holds: as many as fit evenly.
constexpr int kFitting = kStageBytes / (kMultipliers * 16);
constexpr int kPartialBlocks = kFitting >= kTokenBlocks                 ? kTokenBlocks
                               : kFitting >= 8 && kTokenBlocks % 8 == 0 ? 8
                               : kFitting >= 4 && kTokenBlocks % 4 == 0 ? 4
                               : kFitting >= 2 && kTokenBlocks % 2 == 0 ? 2
                                                                        : 1;
// Where the partial sums of a cluster meet. Large tiles have no room for them beside the ring.
constexpr bool kPartialsInRing = TILE_M >= 128;
// Registers of a thread: at launch, of the last warpgroup, of the others (256 is the limit of all).
constexpr int kRegisters = 65536 / (kThreads * MIN_BLOCKS) / 8 * 8;
constexpr int kLoadRegisters = FEW_REGISTERS ? 32 : GROUPED && SHARE > 1 ? 56 : 40;
constexpr int kAvailable = (kRegisters * (WARPGROUPS + 1) - kLoadRegisters) / WARPGROUPS / 8 * 8;
constexpr int kMultiplyRegisters = kAvailable < 232 ? kAvailable : 232;

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

// Of a multiplying warpgroup's channels.
__device__ __forceinline__ int channel_block(int warpgroup) {
  return SLICES > 1 ? warpgroup % kChannelBlocks : warpgroup;
}

struct Problem {
  const int8_t* a8;
  const float* token_scale;
  const uint8_t* weight;
  const float* unit;
  const float* channel_scale;
  const uint16_t* bias;
  Out* out;
  int4* partials;
  int m, m_pad, n, k_blocks, whole_tiles;
  const int4* tiles;
  const int* tile_count;
  int least_idle;
};

#include "sm90_schedule.cuh"

struct Shared {  // addresses in shared memory
  uint32_t stages, staging, scales, pieces, barriers, partials;
  uint32_t reduced, unused;  // barriers: of partial sums; and one that nobody waits for
};

// A position in the ring of stages. Every role walks all stages in order, since a parity tells no
// more than two phases of a barrier apart.
struct Ring {
  uint32_t offset = 0;  // of the stage, bytes
  uint32_t parity = 0;
  // Of the stage's barriers: a power of two of the other, which costs the least to compute.
  __device__ __forceinline__ uint32_t barriers() const { return offset / 128; }
  template <int stages = 1>
  __device__ __forceinline__ void advance() {
    constexpr uint32_t kEnd = STAGES * kStageBytes;
    offset += stages * kStageBytes;
    if (stages == 1 ? offset == kEnd : offset >= kEnd) {
      offset = stages == 1 ? 0 : offset - kEnd;
      parity ^= 1;
    }
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
__device__ __forceinline__ uint2 load_shared_pair(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_shared_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Predicated, never a branch.
__device__ __forceinline__ void store_global(void* p, uint4 v, bool valid) {
  asm volatile(
      "{\n .reg .pred valid;\n setp.ne.b32 valid, %5, 0;\n"
      " @valid st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(p),
      "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(int(valid))
      : "memory");
}

// What the load warp tells the others of a piece, in one of two slots in turn:
// [n0, m0, k_count (0: no more pieces), followers][barrier: announced][barrier: received].
// GROUPED: k_count + 65536 * (followers - kLeft), tokens + 65536 * expert.
constexpr int kSlotBytes = 32;
constexpr int kAnnounced = 16, kReceived = 24;
constexpr int kReceivers = kMultipliers / 32 + (TABLES ? kTableWarps : 0);  // warps

__device__ __forceinline__ void announce(const Shared& s, int number, const Piece& piece) {
  const uint32_t slot = s.pieces + number % 2 * kSlotBytes;
  barrier_wait(slot + kReceived, number / 2 % 2 ^ 1);
  if (elect_one()) {
    const Tile& t = piece.tile;
    const uint32_t k_count = piece.k_count + (GROUPED ? (piece.followers - kLeft) << 16 : 0);
    const uint32_t last = GROUPED ? t.expert << 16 | (t.m_end - t.m0) : piece.followers;
    store_shared(slot, make_uint4(t.n0, t.m0, k_count, last));
    barrier_arrive(slot + kAnnounced);
  }
}
__device__ __forceinline__ Piece read_piece(const Problem& p, const Shared& s, int number) {
  const uint4 v = load_shared(s.pieces + number % 2 * kSlotBytes);
  const int m0 = v.y, expert = GROUPED ? v.w >> 16 : 0;
  return {{int(v.x), m0, GROUPED ? m0 + int(v.w & 0xffff) : p.m, expert},
          0,
          GROUPED ? int(v.z & 0xffff) : int(v.z),
          GROUPED ? int(v.z >> 16) + kLeft : int(v.w)};
}
__device__ __forceinline__ bool receive(const Problem& p, const Shared& s, int number,
                                        Piece& piece) {
  barrier_wait(s.pieces + number % 2 * kSlotBytes + kAnnounced, number / 2 % 2);
  piece = read_piece(p, s, number);
  return piece.k_count > 0;
}
// `piece`: as last read. The address depends on it, by a zero: an arrival overtakes loads.
__device__ __forceinline__ void received(const Shared& s, int number, const Piece& piece) {
  const uint32_t barrier = s.pieces + number % 2 * kSlotBytes + kReceived;
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier + (uint32_t(piece.tile.m0) >> 31));
}

// The three parts use what is defined above.
#include "sm90_load.cuh"
#include "sm90_multiply.cuh"
#include "sm90_output.cuh"

// `slice`: which of the stages in turn; uniform for the compiler, too.
__device__ __forceinline__ void multiply_pieces(const Problem& p, const Shared& s, int slice) {
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128;
  wait_for_previous_kernel();  // it may have written the token scales
  Ring ring;
  if (SLICES > 1) ring.offset = slice * kStageBytes;
  Piece piece;
  for (int number = 0; receive(p, s, number, piece); ++number) {
    // What the output needs is under way while the tile is multiplied.
    ChannelScales c;
    if (!FEW_REGISTERS) c = load_channel_scales(p, piece.tile, warpgroup, thread);
    wait_copies<0>();                   // of a piece that did not need them
    named_barrier(1 + warpgroup, 128);  // the token scales of the tile before have been read
    for (int token = thread; token < TILE_M; token += 128) {
      const int row = piece.tile.m0 + token;
      copy4(s.scales + (warpgroup * kScaleTokens + place_of_scale(token)) * 4, p.token_scale + row,
            row < piece.tile.m_end);
    }
    commit_copies();
    Accumulator acc[kAccumulators];
    const int stages = (piece.k_count + SLICES - 1 - slice) / SLICES;
    const int rows = piece.tile.m_end - piece.tile.m0;
    multiply(acc, s, ring, stages, warpgroup, thread, rows);
    piece = read_piece(p, s, number);  // again, to leave its registers to the multiplication
    received(s, number, piece);
    if (FEW_REGISTERS) c = load_channel_scales(p, piece.tile, warpgroup, thread);
    if (piece.followers == kLeft) {
      leave_partial(p, acc, warpgroup, thread);
      continue;
    }
    if (piece.followers > 0) add_partials(acc, s, ring, piece.followers, warpgroup, thread);
    wait_copies<0>();
    named_barrier(1 + warpgroup, 128);  // the token scales of this tile are there
    if (SLICES > 1) {
      add_slices_and_write(p, s, piece.tile, acc, c, slice, thread);
    } else if (!FEW_REGISTERS && split_size() > 1) {
      reduce_and_write(p, s, piece.tile, acc, c, split_rank(), split_size());
    } else {
      Writer(p, s, piece.tile, c).write<0, kUnits>(acc);
    }
    if (piece.followers > 0) return;  // it was the last, and `ring` is out of date
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
    w4a8_gemm(const int8_t* a8, const float* token_scale, const uint8_t* weight, const float* unit,
              const float* channel_scale, const uint16_t* bias, Out* out, int4* partials, int m,
              int m_pad, int n, int k_blocks, int whole_tiles, const int4* tiles,
              const int* tile_count, int least_idle) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const Problem p = {a8,         token_scale, weight, unit, channel_scale, bias,        out,
                     partials,   m,           m_pad,  n,    k_blocks,      whole_tiles, tiles,
                     tile_count, least_idle};
  const int size = split_size(), rank = split_rank();
  const bool clustered = cluster_size() > 1;
  Shared s;
  s.stages = shared_address(memory);
  s.staging = s.stages + STAGES * kStageBytes;
  s.scales = s.staging + kStagingBytes;
  s.pieces = s.scales + kScaleBytes;
  s.reduced = s.pieces + 2 * kSlotBytes;
  s.unused = s.reduced + 8;
  s.barriers = s.reduced + 16;
  s.partials =
      kPartialsInRing ? s.stages : (s.barriers + STAGES * kStageBytes / 128 + 15) / 16 * 16;

  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      const uint32_t at = s.barriers + i * kStageBytes / 128;
      barrier_init(at + kFull, 1);
      if (TABLES) barrier_init(at + kReady, 2);               // for tables and for tokens
      barrier_init(at + kEmpty, SHARE * kChannelBlocks * 4);  // warps
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(s.pieces + i * kSlotBytes + kAnnounced, 1);
      barrier_init(s.pieces + i * kSlotBytes + kReceived, kReceivers);
    }
    barrier_init(s.reduced, 1);
    barrier_init(s.unused, kMostArrivals);  // is never complete
    barrier_init_fence();
    const int owned = (kUnits - rank + size - 1) / size;  // see reduce_and_write
    barrier_expect(s.reduced, (size - 1) * owned * kUnitBlocks * kMultipliers * 16);
  }
  __syncthreads();
  let_next_kernel_start();
  if (clustered) cluster_arrive();

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);  // uniform for the compiler too
  if (warp / 4 < WARPGROUPS) {
    raise_registers<kMultiplyRegisters>();
    if (clustered) cluster_wait();  // the others' barriers exist
    multiply_pieces(p, s, SLICES > 1 ? warp / 4 / kChannelBlocks : 0);
  } else {
    lower_registers<kLoadRegisters>();
    if (SHARE > 1) cluster_wait();  // the same, for copies to them
    if (warp % 4 == 0) {
      load(p, s, Schedule(p));
    } else if (TABLES) {
      build_tables(p, s, warp % 4 - 1, threadIdx.x % 32);
    }
    if (SHARE == 1 && clustered) cluster_wait();
  }
  if (SHARE > 1) {  // nobody copies to this block or arrives at its barriers any more
    cluster_arrive_release();
    cluster_wait();
  }
}
