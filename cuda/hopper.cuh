// PTX of sm_90a: mbarriers, bulk copies, clusters, warpgroup matrix multiply.
// Needs common.cuh.
#pragma once

// ---- mbarriers ---------------------------------------------------------------------------------
// A barrier's phase completes when its count of arrivals is met and its expected bytes have come.
// Waiting on parity p returns once the phase of that parity is over; a fresh barrier is in phase 0.
constexpr int kMostArrivals = (1 << 20) - 1;  // that a barrier can count

__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At the same barrier of another block of the cluster. Not .release.cluster, which is a slow fence:
// what is released are reads.
__device__ __forceinline__ void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n .reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
      " mbarrier.arrive.release.cta.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// One arrival that also announces `bytes` of bulk copies.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n .reg .pred done;\nwait:\n"
      " mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n @!done bra wait;\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {  // initializations become visible
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ---- clusters ----------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t r;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(r));
  return r;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_release() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
// To the same offset in another block of the cluster, whose barrier counts the bytes that come.
__device__ __forceinline__ void store_remote(uint32_t shared, uint32_t barrier, uint32_t rank,
                                             uint32_t v) {
  asm volatile(
      "{\n .reg .b32 address, counter;\n mapa.shared::cluster.u32 address, %0, %2;\n"
      " mapa.shared::cluster.u32 counter, %1, %2;\n"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [address], %3, "
      "[counter];\n}" ::"r"(shared),
      "r"(barrier), "r"(rank), "r"(v)
      : "memory");
}
__device__ __forceinline__ void store_remote(uint32_t shared, uint32_t barrier, uint32_t rank,
                                             const int (&v)[4]) {
  asm volatile(
      "{\n .reg .b32 address, counter;\n mapa.shared::cluster.u32 address, %0, %2;\n"
      " mapa.shared::cluster.u32 counter, %1, %2;\n"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [address], "
      "{%3, %4, %5, %6}, [counter];\n}" ::"r"(shared),
      "r"(barrier), "r"(rank), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
      : "memory");
}

// ---- flags in global memory, and what they guard ----------------------------------------------

// What the threads of this block wrote before a barrier with this one becomes visible first.
__device__ __forceinline__ void raise_flag(int* flag) {
  asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ __forceinline__ void await_and_lower_flag(int* flag) {
  int raised = 0;
  while (!raised)
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(raised) : "l"(flag) : "memory");
  asm volatile("st.relaxed.gpu.global.s32 [%0], 0;" ::"l"(flag) : "memory");
}

// ---- bulk copies, global -> shared, multiples of 16 bytes --------------------------------------

__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
// The same, to the same offset in every block of the cluster whose bit is set; so the barriers.
template <int blocks>
__device__ __forceinline__ void bulk_copy_to_cluster(uint32_t shared, const void* global,
                                                     uint32_t bytes, uint32_t barrier,
                                                     uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1], %2, [%3], %4, %5;" ::"r"(shared),
      "l"(global), "r"(bytes), "r"(barrier), "h"(uint16_t(blocks)), "l"(policy)
      : "memory");
}
// Bulk copies that follow read what other instructions wrote before.
__device__ __forceinline__ void bulk_copies_see_memory() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
// What the L2 cache should do with the bytes of a copy.
__device__ __forceinline__ uint64_t read_once() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ uint64_t read_again() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// ---- warps and registers -----------------------------------------------------------------------

// True in one lane of the warp. Copies under it are issued from uniform registers, as long as all
// else that the warp does is uniform; under `lane == 0` each becomes a loop over lanes.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n}"
               : "=r"(elected));
  return elected;
}

// 8x8 matrices of 16-bit items, two in a register, stored transposed: lane 8 i + r holds the
// address of row r of matrix i.
__device__ __forceinline__ void store_matrix(uint32_t shared, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared),
               "r"(a), "r"(b)
               : "memory");
}
__device__ __forceinline__ void store_matrix(uint32_t shared, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(a), "r"(b), "r"(c), "r"(d)
      : "memory");
}

template <int count>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Barrier `id` (1..15) of `count` threads of a block.
__device__ __forceinline__ void named_barrier(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// ---- warpgroup matrix multiply -----------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
// Descriptor of an operand in shared memory: rows of 128 bytes, 16-byte chunk c of row r at chunk
// c ^ (r % 8), 1024-byte aligned. `low` is the half that depends on the address: add 1 for 16
// bytes.
__device__ __forceinline__ uint32_t wgmma_descriptor_low(uint32_t shared) {
  return 1 << 16 | (shared & 0x3ffff) >> 4;
}
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t low) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kEightRows = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kEightRows | low;
}

// d[64 x N] = a[64 x 32] * b[32 x N] (+ d unless `clear`), int8 operands, a in registers. Lane
// 4 g + t of warp w holds rows 16 w + g and 16 w + g + 8:
//   a[0], a[1]: k 4 t..4 t + 3 of the two rows; a[2], a[3]: k 16 + 4 t.. of the two rows
//   d[4 j], d[4 j + 1]: columns 8 j + 2 t, + 1 of the first row; d[4 j + 2], d[4 j + 3]: second row
template <int N>
__device__ __forceinline__ void wgmma_s8(int (&d)[N / 2], const uint32_t* a, uint64_t b,
                                         bool clear);

#define D4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define D8(i) D4(i), D4(i + 4)
#define D16(i) D8(i), D8(i + 8)
#define D32(i) D16(i), D16(i + 16)
#define D64(i) D32(i), D32(i + 32)
#define P4_0 "%0, %1, %2, %3"
#define P8_0 P4_0 ", %4, %5, %6, %7"
#define P12_0 P8_0 ", %8, %9, %10, %11"
#define P16_0 P8_0 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define P24_0 P16_0 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define P32_0 \
  P16_0 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define P40_0 P32_0 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define P48_0 \
  P32_0       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define P64_0 \
  P48_0       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define P80_0 \
  P64_0       \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define P96_0 \
  P80_0       \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define P128_0                                                                                 \
  P96_0                                                                                        \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110"     \
  ", %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125" \
  ", %126, %127"
#define DEFINE_WGMMA(N, ACCUMULATORS, OPERANDS, A, B, P)                                      \
  template <>                                                                                 \
  __device__ __forceinline__ void wgmma_s8<N>(int (&d)[N / 2], const uint32_t* a, uint64_t b, \
                                              bool clear) {                                   \
    asm volatile("{\n .reg .pred p;\n setp.eq.b32 p, %" P                                     \
                 ", 0;\n wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8.s8 {" ACCUMULATORS \
                 "}, {" A "}, %" B ", p;\n}"                                                  \
                 : OPERANDS                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(clear)));      \
  }
#define COMMA ,
DEFINE_WGMMA(8, P4_0, D4(0), "%4, %5, %6, %7", "8", "9")
DEFINE_WGMMA(16, P8_0, D8(0), "%8, %9, %10, %11", "12", "13")
DEFINE_WGMMA(24, P12_0, D8(0) COMMA D4(8), "%12, %13, %14, %15", "16", "17")
DEFINE_WGMMA(32, P16_0, D16(0), "%16, %17, %18, %19", "20", "21")
DEFINE_WGMMA(48, P24_0, D16(0) COMMA D8(16), "%24, %25, %26, %27", "28", "29")
DEFINE_WGMMA(64, P32_0, D32(0), "%32, %33, %34, %35", "36", "37")
DEFINE_WGMMA(80, P40_0, D32(0) COMMA D8(32), "%40, %41, %42, %43", "44", "45")
DEFINE_WGMMA(96, P48_0, D32(0) COMMA D16(32), "%48, %49, %50, %51", "52", "53")
DEFINE_WGMMA(128, P64_0, D64(0), "%64, %65, %66, %67", "68", "69")
DEFINE_WGMMA(160, P80_0, D64(0) COMMA D16(64), "%80, %81, %82, %83", "84", "85")
DEFINE_WGMMA(192, P96_0, D64(0) COMMA D32(64), "%96, %97, %98, %99", "100", "101")
DEFINE_WGMMA(256, P128_0, D64(0) COMMA D64(64), "%128, %129, %130, %131", "132", "133")
