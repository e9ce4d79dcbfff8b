// Runs CUDA kernels on the CPU, one thread for each of a block's, so that sanitizers can watch
// them. Blocks run one after the other: a static variable of a function is their shared memory.

#pragma once

#include <array>
#include <barrier>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

namespace simt {

constexpr unsigned kLanes = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// What a lane gave to its last two shuffles. A lane cannot begin the shuffle after next before all
// others have read what it gave to this one, so that one barrier a shuffle is enough.
struct Lane {
  struct Given {
    unsigned shuffle = 0;
    uint64_t bits = 0;
  };
  std::array<Given, 2> given;
};

struct Warp {
  std::array<Lane, kLanes> lanes;
  std::barrier<> meets{kLanes};
};

struct Block {
  explicit Block(unsigned num_threads) : warps(num_threads / kLanes), meets(num_threads) {}
  std::deque<Warp> warps;
  std::barrier<> meets;
};

// Of this thread.
inline thread_local Block* block = nullptr;
inline thread_local unsigned shuffles = 0;

}  // namespace simt

inline thread_local simt::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { simt::block->meets.arrive_and_wait(); }

template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int distance) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  const unsigned lane = threadIdx.x % simt::kLanes, shuffle = ++simt::shuffles;
  simt::Warp& warp = simt::block->warps[threadIdx.x / simt::kLanes];
  simt::Lane::Given& given = warp.lanes[lane].given[shuffle % 2];
  given.shuffle = shuffle;
  std::memcpy(&given.bits, &value, sizeof value);
  warp.meets.arrive_and_wait();
  const simt::Lane::Given& other = warp.lanes[lane ^ distance].given[shuffle % 2];
  if (mask != 0xffffffffu || other.shuffle != shuffle) {
    std::fprintf(stderr, "block %u, thread %u: shuffle with a lane that is not there\n", blockIdx.x,
                 threadIdx.x);
    std::abort();
  }
  std::memcpy(&value, &other.bits, sizeof value);
  return value;
}

namespace simt {

// kernel<<<num_blocks, num_threads>>>(arguments...), with whole warps of threads.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, unsigned num_blocks, unsigned num_threads, Arguments... arguments) {
  std::deque<Block> blocks;
  for (unsigned i = 0; i < num_blocks; ++i) blocks.emplace_back(num_threads);
  std::barrier<> between_blocks(num_threads);
  std::vector<std::jthread> threads;
  for (unsigned thread = 0; thread < num_threads; ++thread) {
    threads.emplace_back([&, thread] {
      threadIdx = {thread}, blockDim = {num_threads}, gridDim = {num_blocks};
      for (unsigned i = 0; i < num_blocks; ++i) {
        blockIdx = {i}, block = &blocks[i], shuffles = 0;
        kernel(arguments...);
        // A thread that has returned is not waited for.
        block->warps[thread / kLanes].meets.arrive_and_drop();
        block->meets.arrive_and_drop();
        between_blocks.arrive_and_wait();
      }
    });
  }
}

}  // namespace simt
