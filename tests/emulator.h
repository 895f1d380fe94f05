// What a kernel of cuda/ sees of a GPU, on a CPU: see emulator.py, which compiles them together.
//
// A thread is a fiber; they take turns in one thread of the host, and one that waits is passed
// over. Whatever a GPU may do later is done as late as it is allowed to: bulk copies at random
// times, the reads and sums of a wgmma when somebody waits for it. So what a kernel frees too
// early, or reads too early, gives other bits here, too; and when nobody can go on, that is a
// deadlock.
//
// Not here: the memory model (all of memory is the same for everyone at once), timing, and ptxas.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __launch_bounds__(...)
#define __CUDA_ARCH__ 900

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
template <class A, class B>
auto min(A a, B b) -> decltype(a + b) {
  return a < b ? a : b;
}
template <class A, class B>
auto max(A a, B b) -> decltype(a + b) {
  return a < b ? b : a;
}
template <class To, class From>
To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &v, sizeof(to));
  return to;
}
inline float __uint_as_float(uint32_t v) { return bits_as<float>(v); }
inline float __int_as_float(int v) { return bits_as<float>(v); }
inline int __float_as_int(float v) { return bits_as<int>(v); }
inline uint32_t __float_as_uint(float v) { return bits_as<uint32_t>(v); }
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
template <class T>
T __ldcg(const T* p) {
  return *p;
}

// ---- the machine -------------------------------------------------------------------------------

constexpr uint32_t kSharedBytes = 227 * 1024;  // of a block, at most
constexpr uint32_t kSpan = 1 << 18;            // from one block's shared addresses to the next's
constexpr uint32_t kStatics = 240 * 1024;  // where a block's variables begin that are not dynamic
constexpr int kStackBytes = 48 * 1024;

struct Multiplication {  // a wgmma of a thread
  int* d;
  int n;
  const uint32_t* a;
  uint64_t b;
  bool clear;
};
struct Fiber {
  int block, thread;
  bool done = false;
  std::function<bool()> waits_for;
  std::vector<Multiplication> issued;                  // since the last commit
  std::vector<std::vector<Multiplication>> committed;  // and not yet done
  std::vector<long> cluster_phases;
  ucontext_t context;
  std::vector<char> stack;
};
struct Mbarrier {
  int count, pending;
  long bytes = 0;
  uint32_t phase = 0;
};
struct Meeting {  // of threads that wait for each other
  int arrived = 0;
  long phase = 0;
};
struct Cluster {
  int threads;  // that have not ended
  Meeting meeting;
  void go_on() {
    if (meeting.arrived == threads) meeting = {0, meeting.phase + 1};
  }
};
struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes, barrier;
};
struct Word {  // on its way to another GPU
  uint32_t *to, value;
};
using Range = std::pair<const void*, int64_t>;  // of global memory

struct Machine {
  int grid, threads, cluster;
  uint32_t seed;
  std::vector<Range> readable, writable;  // by bulk copies; by stores of outputs, to other GPUs
  int kernels = 1, ranks = 1;             // one after the other, on each; all have as many blocks

  std::vector<Fiber> fibers;
  Fiber* now = nullptr;
  ucontext_t scheduler;
  std::vector<uint8_t> shared;
  std::unordered_map<uint32_t, Mbarrier> barriers;
  std::map<std::pair<int, int>, Meeting> meetings;
  std::vector<Cluster> clusters;
  std::vector<Copy> copies;
  std::vector<Word> words;
  std::map<int, uint32_t> statics;  // by the line of their declaration
  uint32_t statics_end = kStatics;
  std::map<std::pair<int, int>, std::array<std::array<uint32_t, 6>, 32>> of_lanes;
  std::map<int, int> ended;  // threads, by kernel and rank
  std::map<std::pair<int, const void*>, int> seen;
  bool progress = false;
  std::string error;

  int blocks() const { return grid / (kernels * ranks); }
  int rank_of(const Fiber& fiber) const { return fiber.block / blocks() % ranks; }

  void fail(const std::string& what) {
    if (!error.empty()) return;
    error = what;
    if (now) {
      error += ": block " + std::to_string(now->block) + ", thread " + std::to_string(now->thread);
    }
  }
  uint32_t random() { return (seed = seed * 1664525 + 1013904223) >> 8; }
};
inline Machine* machine;

struct Index {
  uint32_t x;
};
#define threadIdx (Index{uint32_t(machine->now->thread)})
#define blockIdx (Index{uint32_t(machine->now->block % machine->blocks())})
#define blockDim (Index{uint32_t(machine->threads)})
#define gridDim (Index{uint32_t(machine->grid)})

inline void wait_until(std::function<bool()> happened) {
  Fiber& fiber = *machine->now;
  if (happened()) return;
  fiber.waits_for = std::move(happened);
  swapcontext(&fiber.context, &machine->scheduler);
}
inline void meet(Meeting& meeting, int count) {
  const long phase = meeting.phase;
  if (++meeting.arrived == count) {
    meeting.arrived = 0, ++meeting.phase;
  } else {
    wait_until([&meeting, phase] { return meeting.phase != phase; });
  }
}
inline Meeting& meeting_of_block(int id) { return machine->meetings[{machine->now->block, id}]; }
inline void named_barrier(int id, int count) { meet(meeting_of_block(id), count); }
inline void __syncthreads() { named_barrier(0, machine->threads); }
inline void __syncwarp() { named_barrier(100 + machine->now->thread / 32, 32); }
inline int __shfl_sync(uint32_t, int uniform, int) { return uniform; }
// What all lanes of a warp give, up to six words.
inline std::array<std::array<uint32_t, 6>, 32> shared_by_lanes(std::array<uint32_t, 6> own) {
  auto& lanes = machine->of_lanes[{machine->now->block, machine->now->thread / 32}];
  lanes[machine->now->thread % 32] = own;
  __syncwarp();
  const auto all = lanes;
  __syncwarp();
  return all;
}
inline float __shfl_xor_sync(uint32_t, float v, int mask) {
  return bits_as<float>(
      shared_by_lanes({bits_as<uint32_t>(v)})[machine->now->thread % 32 ^ mask][0]);
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t v) {
  const auto all = shared_by_lanes({v});
  return (*std::max_element(all.begin(), all.end()))[0];
}
inline bool elect_one() { return machine->now->thread % 32 == 0; }

inline uint8_t* in_shared(uint32_t address, uint32_t bytes) {
  const uint32_t begin = address % kSpan, end = begin + bytes;
  const bool is_static = kStatics <= begin && end <= machine->statics_end;
  if (address / kSpan >= uint32_t(machine->grid) || end > kSharedBytes && !is_static) {
    machine->fail("an address outside of shared memory");
    return machine->shared.data();
  }
  return machine->shared.data() + address;
}
template <class T>
T load_from_shared(uint32_t address) {
  T v;
  memcpy(&v, in_shared(address, sizeof(v)), sizeof(v));
  return v;
}
template <class T>
void store_to_shared(uint32_t address, T v) {
  memcpy(in_shared(address, sizeof(v)), &v, sizeof(v));
}
inline uint8_t* shared_of_block() { return machine->shared.data() + machine->now->block * kSpan; }
// A variable in static shared memory, which the source line tells from others.
template <class T>
T& static_of_block(int line) {
  const auto [at, is_new] = machine->statics.try_emplace(line, machine->statics_end);
  if (is_new) machine->statics_end += (sizeof(T) + 15) / 16 * 16;
  if (machine->statics_end > kSpan) machine->fail("too many variables in shared memory");
  return *reinterpret_cast<T*>(shared_of_block() + at->second);
}
inline void check_global(const std::vector<Range>& ranges, const void* p, int64_t bytes) {
  const char* at = static_cast<const char*>(p);
  for (const auto& [begin, size] : ranges) {
    const char* first = static_cast<const char*>(begin);
    if (first <= at && at + bytes <= first + size) return;
  }
  machine->fail("an access outside of global memory");
}

// ---- hopper.cuh --------------------------------------------------------------------------------

inline Mbarrier& barrier_at(uint32_t address) {
  static Mbarrier none = {1 << 30, 1 << 30};
  const auto found = machine->barriers.find(address);
  if (found != machine->barriers.end()) return found->second;
  machine->fail("a barrier that was not initialized");
  return none;
}
inline void complete_phase(Mbarrier& barrier) {
  if (barrier.pending < 0) machine->fail("more arrivals than a barrier counts");
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++barrier.phase;
  barrier.pending = barrier.count;
}
inline void barrier_init(uint32_t address, int count) {
  machine->barriers[address] = {count, count};
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t address) {
  Mbarrier& barrier = barrier_at(address);
  --barrier.pending;
  complete_phase(barrier);
}
inline void barrier_expect(uint32_t address, uint32_t bytes) {
  barrier_at(address).bytes += bytes;
  barrier_arrive(address);
}
inline void bytes_have_come(uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = barrier_at(address);
  barrier.bytes -= bytes;
  complete_phase(barrier);
}
inline void barrier_wait(uint32_t address, uint32_t parity) {
  Mbarrier& barrier = barrier_at(address);
  wait_until([&barrier, parity] { return (barrier.phase & 1) != parity; });
}

inline uint32_t cluster_size() { return machine->cluster; }
inline uint32_t cluster_rank() { return machine->now->block % machine->cluster; }
inline uint32_t address_in(uint32_t rank, uint32_t address) {
  return (machine->now->block - cluster_rank() + rank) * kSpan + address % kSpan;
}
inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  barrier_arrive(address_in(rank, barrier));
}
inline Cluster& own_cluster() { return machine->clusters[machine->now->block / machine->cluster]; }
inline void cluster_arrive() {
  Cluster& cluster = own_cluster();
  machine->now->cluster_phases.push_back(cluster.meeting.phase);
  ++cluster.meeting.arrived;
  cluster.go_on();
}
inline void cluster_arrive_release() { cluster_arrive(); }
inline void cluster_wait() {
  const Meeting& meeting = own_cluster().meeting;
  const long phase = machine->now->cluster_phases.back();
  machine->now->cluster_phases.pop_back();
  wait_until([&meeting, phase] { return meeting.phase != phase; });
}
inline void store_remote(uint32_t shared, uint32_t barrier, uint32_t rank, uint32_t v) {
  store_to_shared(address_in(rank, shared), v);
  bytes_have_come(address_in(rank, barrier), 4);
}
inline void store_remote(uint32_t shared, uint32_t barrier, uint32_t rank, const int (&v)[4]) {
  store_to_shared(address_in(rank, shared),
                  uint4{uint32_t(v[0]), uint32_t(v[1]), uint32_t(v[2]), uint32_t(v[3])});
  bytes_have_come(address_in(rank, barrier), 16);
}

inline void raise_flag(int* flag) { *flag = 1; }
inline void await_and_lower_flag(int* flag) {
  wait_until([flag] { return *flag == 1; });
  *flag = 0;
}

inline void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                      uint64_t) {
  check_global(machine->readable, global, bytes);
  if ((shared | bytes | reinterpret_cast<uintptr_t>(global)) % 16) {
    machine->fail("a misaligned bulk copy");
  }
  machine->copies.push_back({shared, global, bytes, barrier});
}
template <int blocks>
void bulk_copy_to_cluster(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier,
                          uint64_t policy) {
  for (int rank = 0; rank < 8; ++rank) {
    if (blocks >> rank & 1) {
      bulk_copy(address_in(rank, shared), global, bytes, address_in(rank, barrier), policy);
    }
  }
}
inline void bulk_copies_see_memory() {}
inline uint64_t read_once() { return 0; }
inline uint64_t read_again() { return 0; }

// Element (row, column) of matrix i is in lane 4 column + row / 2, before they are transposed.
template <int count>
void store_matrices(uint32_t shared, const uint32_t (&v)[count]) {
  struct Lane {
    uint32_t address, v[count];
  };
  static std::map<int, Lane> lanes;
  const int first = machine->now - machine->fibers.data() - machine->now->thread % 32;
  Lane& own = lanes[machine->now - machine->fibers.data()];
  own.address = shared;
  memcpy(own.v, v, sizeof(v));
  __syncwarp();
  if (elect_one()) {
    for (int i = 0; i < count * 64; ++i) {
      const int matrix = i / 64, row = i / 8 % 8, column = i % 8;
      const uint32_t word = lanes[first + 4 * column + row / 2].v[matrix];
      store_to_shared(lanes[first + 8 * matrix + row].address + 2 * column,
                      uint16_t(word >> row % 2 * 16));
    }
  }
  __syncwarp();
}
inline void store_matrix(uint32_t shared, uint32_t a, uint32_t b) {
  store_matrices<2>(shared, {a, b});
}
inline void store_matrix(uint32_t shared, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  store_matrices<4>(shared, {a, b, c, d});
}
template <int>
void raise_registers() {}
template <int>
void lower_registers() {}

template <int N>
void wgmma_s8(int (&d)[N / 2], const uint32_t* a, uint64_t b, bool clear) {
  machine->now->issued.push_back({d, N, a, b, clear});
}
inline void wgmma_fence() { named_barrier(200 + machine->now->thread / 128, 128); }
inline void wgmma_commit() {
  machine->now->committed.push_back(std::move(machine->now->issued));
  machine->now->issued.clear();
}
// Multiplication `i` of the oldest group: four lanes hold the two rows of `a` between them.
inline void multiply_now(size_t i) {
  const Fiber& fiber = *machine->now;
  const Multiplication& op = fiber.committed[0][i];
  const int lane = fiber.thread % 4;
  int8_t rows[2][32];
  for (int t = 0; t < 4; ++t) {
    const uint32_t* a = (&fiber - lane + t)->committed[0][i].a;
    for (int h = 0; h < 4; ++h) memcpy(&rows[h % 2][h / 2 * 16 + t * 4], &a[h], 4);
  }
  const uint32_t b = fiber.block * kSpan + uint32_t(op.b & 0x3fff) * 16;
  for (int token = 0; token < op.n; ++token) {
    if (token % 8 / 2 != lane) continue;
    int8_t column[32];
    for (int half = 0; half < 32; half += 16) {
      const uint32_t at = b + token * 128 + half;
      memcpy(column + half, in_shared(at ^ (at >> 7 & 7) << 4, 16), 16);
    }
    for (int h = 0; h < 2; ++h) {
      int& d = op.d[token / 8 * 4 + h * 2 + token % 2];
      int sum = op.clear ? 0 : d;
      for (int k = 0; k < 32; ++k) sum += rows[h][k] * column[k];
      d = sum;
    }
  }
}
template <int pending>
void wgmma_wait() {
  auto& committed = machine->now->committed;
  __syncwarp();
  while (int(committed.size()) > pending) {
    for (size_t i = 0; i < committed[0].size(); ++i) multiply_now(i);
    __syncwarp();
    committed.erase(committed.begin());
    __syncwarp();
  }
}

// ---- common.cuh, fold.cuh, and what the kernel has of its own ----------------------------------

template <class T>
T opaque(T v) {
  return v;
}
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> 4 * i & 15;
    uint32_t byte = (uint64_t(b) << 32 | a) >> (s & 7) * 8 & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    d |= byte << 8 * i;
  }
  return d;
}
inline float mul_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float clamp(float x, float limit) { return std::fmax(std::fmin(x, limit), -limit); }
inline float int_to_float(int a) { return float(a); }
template <int dtype>
float to_float(uint16_t bits) {
  return dtype == 0 ? bits_as<float>(uint32_t(bits) << 16) : float(bits_as<_Float16>(bits));
}
template <int dtype>
uint16_t from_float(float x) {
  if (dtype != 0) return bits_as<uint16_t>(_Float16(x));
  const uint32_t bits = bits_as<uint32_t>(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <int dtype>
uint32_t from_floats(float low, float high) {
  return from_float<dtype>(low) | uint32_t(from_float<dtype>(high)) << 16;
}
inline void let_next_kernel_start() {}  // all start at once
inline int own_kernel() { return machine->now->block / machine->blocks(); }  // and rank
inline void wait_for_previous_kernel() {
  const int previous = own_kernel() - machine->ranks, all = machine->blocks() * machine->threads;
  if (previous < 0) return;
  const int& ended = machine->ended[previous];
  wait_until([&ended, all] { return ended == all; });
}
inline uint32_t shared_address(const void* p) {
  return static_cast<const uint8_t*>(p) - machine->shared.data();
}
inline uint4 load8_if(bool there, const uint4* x) {
  return there ? *x : uint4{0x80008000, 0x80008000, 0x80008000, 0x80008000};
}
// Lane 8 i + r gives the address of row r of matrix i; lane 4 r + t gets word t of it.
inline void load_matrix_x4(uint32_t (&d)[4], uint32_t shared) {
  const auto all = shared_by_lanes({shared});
  const int lane = machine->now->thread % 32;
  for (int i = 0; i < 4; ++i) {
    d[i] = load_from_shared<uint32_t>(all[8 * i + lane / 4][0] + lane % 4 * 4);
  }
}
// Lane 4 g + t has words t and t + 4 of rows g and g + 8 of a and of column g of b, and gets the
// sums of those rows and columns 2 t and 2 t + 1.
inline void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int c0, int c1,
                   int c2, int c3) {
  const auto all = shared_by_lanes({a[0], a[1], a[2], a[3], b0, b1});
  const int lane = machine->now->thread % 32, c[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; ++i) {
    d[i] = c[i];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t row = all[lane / 4 * 4 + k / 4][i / 2 + 2 * half];
        const uint32_t column = all[(lane % 4 * 2 + i % 2) * 4 + k / 4][4 + half];
        d[i] += int8_t(row >> k % 4 * 8) * int8_t(column >> k % 4 * 8);
      }
    }
  }
}
inline void copy4(uint32_t shared, const void* global, bool valid) {
  store_to_shared(shared, valid ? *static_cast<const uint32_t*>(global) : 0);
}
inline void commit_copies() {}
template <int>
void wait_copies() {}

inline uint32_t all_ones() { return 0xffffffff; }
inline uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }
inline uint32_t scaled_code(float code, float scale, float base) {
  return bits_as<uint32_t>(std::fma(code, scale, base));
}

inline uint4 load_shared(uint32_t address) { return load_from_shared<uint4>(address); }
inline uint2 load_shared_pair(uint32_t address) { return load_from_shared<uint2>(address); }
inline void store_shared(uint32_t address, uint4 v) { store_to_shared(address, v); }
inline uint32_t load_shared_word(uint32_t address) { return load_from_shared<uint32_t>(address); }
inline int load_scale(uint32_t address) { return load_from_shared<int16_t>(address); }
inline void store_global(void* p, uint4 v, bool valid) {
  if (!valid) return;
  check_global(machine->writable, p, 16);
  if (machine->error.empty()) memcpy(p, &v, 16);
}

// ---- rows.cuh, all_reduce.cu -------------------------------------------------------------------

inline uint32_t max_of_halves(uint32_t a, uint32_t b) {
  return std::max(a & 0xffff0000, b & 0xffff0000) | std::max(a & 0xffff, b & 0xffff);
}
// Each word arrives by itself, some time.
inline void store_system(uint4* to, uint4 v) {
  check_global(machine->writable, to, 16);
  const uint32_t values[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 4; ++i) {
    machine->words.push_back({reinterpret_cast<uint32_t*>(to) + i, values[i]});
  }
}
// Who looks again and again is passed over until another word is there.
inline uint4 load_system(const uint4* at) {
  check_global(machine->writable, at, 16);
  int& seen = machine->seen[{int(machine->now - machine->fibers.data()), at}];
  const auto there = [at] {
    return (at->x != ~0u) + (at->y != ~0u) + (at->z != ~0u) + (at->w != ~0u);
  };
  wait_until([&seen, there] { return there() > seen; });
  seen = there() % 4;
  return *at;
}
inline void make_unsent(uint4* at) { *at = {~0u, ~0u, ~0u, ~0u}; }

// ---- running -----------------------------------------------------------------------------------

inline std::function<void()> kernel;
inline void run_fiber() {
  kernel();
  machine->now->done = true;
  ++machine->ended[own_kernel()];
  Cluster& cluster = own_cluster();
  --cluster.threads;
  if (cluster.meeting.arrived > 0) cluster.go_on();
  swapcontext(&machine->now->context, &machine->scheduler);
}

// Runs `kernel` with all blocks at once. Returns what went wrong, or nothing.
inline std::string run(Machine& m) {
  machine = &m;
  m.shared.assign(size_t(m.grid) * kSpan, 0xa5);
  m.fibers.resize(size_t(m.grid) * m.threads);
  m.clusters.assign(m.grid / m.cluster, {m.cluster * m.threads});
  for (size_t i = 0; i < m.fibers.size(); ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.block = i / m.threads, fiber.thread = i % m.threads;
    fiber.stack.resize(kStackBytes);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run_fiber, 0);
  }
  int paused = -1;  // a rank: others go on, as far as they get
  for (bool running = true; running && m.error.empty();) {
    running = false;
    if (m.ranks > 1 && m.random() % 16 == 0) paused = int(m.random() % (m.ranks + 1)) - 1;
    bool progress = paused >= 0;
    for (Fiber& fiber : m.fibers) {
      running |= !fiber.done;
      if (m.rank_of(fiber) == paused) continue;
      if (fiber.done || (fiber.waits_for && !fiber.waits_for()) || !m.error.empty()) continue;
      if (m.ranks > 1 && m.random() % 8 == 0) {
        progress = true;  // later
        continue;
      }
      fiber.waits_for = nullptr;
      m.now = &fiber;
      swapcontext(&m.scheduler, &fiber.context);
      m.now = nullptr;
      progress = true;
    }
    if (running && !progress && m.copies.empty() && m.words.empty()) m.fail("deadlock");
    for (size_t i = 0; i < m.words.size();) {
      if (m.random() % 3 > 0 && (progress || i > 0)) {
        ++i;
        continue;
      }
      *m.words[i].to = m.words[i].value;
      m.words[i] = m.words.back();
      m.words.pop_back();
      progress = true;
    }
    for (size_t i = 0; i < m.copies.size();) {
      if (m.random() % 3 > 0 && (progress || i > 0)) {
        ++i;
        continue;
      }
      const Copy copy = m.copies[i];
      m.copies.erase(m.copies.begin() + i);
      memcpy(in_shared(copy.to, copy.bytes), copy.from, copy.bytes);
      bytes_have_come(copy.barrier, copy.bytes);
      progress = true;
    }
  }
  for (const auto& [address, barrier] : m.barriers) {
    if (barrier.bytes < 0) m.fail("bytes that no barrier expected");
  }
  if (!m.copies.empty()) m.fail("copies that nobody waited for");
  return m.error;
}
