// What a kernel runs on: memory that knows who touched it and when, warps, and blocks of threads.
//
// Time is the number of instructions so far. An access is ordered before another one where a
// barrier's completion lies between them, or where one thread does both.

#pragma once

#include <algorithm>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "program.h"

namespace ptx {

using Time = uint32_t;

// What ends a launch: going on would mean nothing.
struct Fault : std::runtime_error {
  Fault(std::string kind_, const std::string& message)
      : std::runtime_error(message), kind(std::move(kind_)) {}
  std::string kind;
};

constexpr uint16_t kSeveral = 0xffff;  // threads that read a byte

// The last write and the last read of a byte.
struct Touched {
  Time written = 0, read = 0;
  uint16_t writer = 0, reader = 0;
};

struct Space {
  unsigned char* data = nullptr;
  int64_t size = 0;
  bool is_global = false;
  std::string name;
  std::vector<Touched> touched;
  std::vector<unsigned char> undefined;  // of shared memory: bytes that nobody has written
};

struct Findings {
  std::vector<std::pair<std::string, std::string>> all;  // kind and message
  std::set<std::pair<std::string, int>> seen;

  void add(const std::string& kind, const Instruction& at, const std::string& message) {
    if (seen.emplace(kind, at.line).second) all.emplace_back(kind, where(at) + message);
  }
};

// `cp.async` on its way: it lands, and reads its source, when it is waited for.
struct Copy {
  const Instruction* at;
  int lane, bytes, from_source;
  int64_t target;
  uint64_t source;
  Time issued;
};

// `wgmma` on its way: it reads shared memory when it is waited for.
struct Product {
  const Instruction* at;
  uint64_t left, right;  // descriptors; `left` is not used where it is in registers
  bool accumulates;
  Time issued;
  std::vector<uint32_t> fragment;  // the left operand's registers, where it is in registers
};

// What was issued, by groups of which each is waited for as a whole.
template <class Job>
struct Groups {
  std::vector<Job> open;
  std::deque<std::vector<Job>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }
};

struct Block;

struct Group {
  int pc;
  uint32_t lanes;
  bool waits;  // at an instruction that needs all lanes
};

struct Warp {
  Warp(Block& block_, int index_);

  void step();
  bool is_done() const { return active == 0; }

  Register& file(int slot) { return registers[slot]; }
  template <class T>
  T* as(int slot) {
    return registers[slot].as<T>();
  }
  uint32_t& bits(int slot) { return *registers[slot].as<uint32_t>(); }

  // Store a result in the lanes that execute; `unknown` says in which of them it is undefined.
  template <class T>
  void write(int slot, const T* values, uint32_t unknown) {
    T* to = as<T>(slot);
    if (mask == kAllLanes) {
      std::memcpy(to, values, kLanes * sizeof(T));
    } else {
      for (int lane = 0; lane < kLanes; ++lane)
        if (mask >> lane & 1) to[lane] = values[lane];
    }
    mark(slot, unknown);
  }
  void write_bits(int slot, uint32_t values, uint32_t unknown) {
    bits(slot) = (bits(slot) & ~mask) | (values & mask);
    mark(slot, unknown);
  }
  void mark(int slot, uint32_t unknown);

  int thread(int lane) const { return index * kLanes + lane; }
  // Report that what an instruction uses as an address, say, is undefined.
  void require_known(int slot, const Instruction& at, const char* use);
  void settle();

  Block& block;
  int index;
  std::vector<Register> registers;
  std::vector<uint32_t> undefined;  // by register, a bit for each lane
  std::vector<Time> written;        // by register
  std::vector<int> in_flight;       // by register, the products that will write it
  std::vector<uint32_t> before;     // what was undefined before these
  int pc = 0;
  uint32_t active = kAllLanes;  // the lanes at `pc`
  uint32_t mask = kAllLanes;    // those that execute this instruction
  std::vector<Group> elsewhere;
  int barrier = -1;  // that it waits at
  Groups<Copy> copies;
  Groups<Product> products;
  Time register_fence = 0, proxy_fence = 0;
  Time proxy_fence_epoch = 0;  // when the epoch of the last proxy fence began
  int64_t num_products = 0;
};

struct Launch {
  const Program& program;
  std::vector<Space> buffers;  // global memory: buffer b begins at (b + 1) << 40
  std::vector<unsigned char> parameters;
  std::array<int, 3> blocks;
  int shared_bytes;
  Findings findings;
  Time now = 1;
  uint64_t num_instructions = 0;
};

constexpr int kBufferShift = 40;

struct Block {
  Block(Launch& launch_, std::array<int, 3> id, unsigned seed);

  void run();

  Space& global(uint64_t address, int bytes, const Instruction& at, int64_t& offset);
  void check_shared(int64_t address, int bytes, const Instruction& at);
  static void check_alignment(uint64_t address, int bytes, const Instruction& at);
  void read(Space& space, int64_t at, int bytes, int thread, const Instruction& by);
  void write(Space& space, int64_t at, int bytes, int thread, const unsigned char* value,
             const Instruction& by);

  Launch& launch;
  const Program& program;
  Space shared;
  std::vector<unsigned char> shared_bytes;
  std::deque<Warp> warps;
  std::mt19937 random;
  Time start;  // of this block: what is older was done by another one
  Time epoch;  // the last barrier's completion
  // By warp: its writes to shared memory up to here are known to the async proxy of all threads.
  std::vector<Time> published;

 private:
  void race(Space& space, int64_t at, const char* what, int thread, int other, bool other_block,
            const Instruction& by);
  void complete_barrier();
};

inline Warp::Warp(Block& block_, int index_)
    : block(block_),
      index(index_),
      registers(block_.program.width.size()),
      undefined(registers.size(), kAllLanes),
      written(registers.size(), 0),
      in_flight(registers.size(), 0),
      before(registers.size(), 0) {
  const Program& program = block.program;
  std::memset(static_cast<void*>(registers.data()), 0xff, registers.size() * sizeof(Register));
  for (const Constant& one : program.constants) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (one.width == 2) as<uint16_t>(one.slot)[lane] = uint16_t(one.value);
      if (one.width == 4) as<uint32_t>(one.slot)[lane] = uint32_t(one.value);
      if (one.width == 8) as<uint64_t>(one.slot)[lane] = one.value;
    }
    if (one.width == 0) bits(one.slot) = one.value ? kAllLanes : 0;
    undefined[one.slot] = 0;
  }
}

inline void Warp::mark(int slot, uint32_t unknown) {
  undefined[slot] = (undefined[slot] & ~mask) | (unknown & mask);
  written[slot] = block.launch.now;
  if (in_flight[slot])
    block.launch.findings.add("flight", block.program.code[pc],
                              block.program.names[slot] + " is written while wgmma works on it");
}

inline void Warp::require_known(int slot, const Instruction& at, const char* use) {
  if (undefined[slot] & mask)
    block.launch.findings.add("undefined", at,
                              block.program.names[slot] + " is undefined, and " + use);
}

// Go on with the lanes whose instruction comes first, so that those that took another way catch up.
// Lanes at an instruction that needs all of them wait for the others.
inline void Warp::settle() {
  if (active) elsewhere.push_back({pc, active, false});
  for (size_t i = 0; i < elsewhere.size(); ++i)
    for (size_t j = elsewhere.size() - 1; j > i; --j)
      if (elsewhere[i].pc == elsewhere[j].pc) {
        elsewhere[i].lanes |= elsewhere[j].lanes;
        elsewhere[i].waits = false;
        elsewhere.erase(elsewhere.begin() + long(j));
      }
  active = 0;
  if (elsewhere.empty()) return;
  auto next = elsewhere.end();
  for (auto one = elsewhere.begin(); one != elsewhere.end(); ++one)
    if (!one->waits && (next == elsewhere.end() || one->pc < next->pc)) next = one;
  if (next == elsewhere.end()) {
    const Instruction& at = block.program.code[elsewhere[0].pc];
    throw Fault("divergence",
                where(at) + "some lanes of warp " + std::to_string(index) + " do not come here");
  }
  pc = next->pc;
  active = next->lanes;
  elsewhere.erase(next);
}

inline void Warp::step() {
  const Instruction& at = block.program.code[pc];
  ++block.launch.now;
  ++block.launch.num_instructions;
  mask = active;
  if (at.guard >= 0) {
    require_known(at.guard, at, "decides whether this is done");
    mask &= at.guard_is_negated ? ~bits(at.guard) : bits(at.guard);
  }
  if (at.is_collective && mask && mask != kAllLanes) {
    elsewhere.push_back({pc, active, true});
    active = 0;
    settle();
    return;
  }
  if (at.decides) {
    at.run(*this, at);
    return;
  }
  if (mask) at.run(*this, at);
  ++pc;
  if (!elsewhere.empty()) settle();
}

inline Block::Block(Launch& launch_, std::array<int, 3> id, unsigned seed)
    : launch(launch_), program(launch_.program), random(seed) {
  start = epoch = ++launch.now;
  shared_bytes.assign(launch.shared_bytes, 0xff);
  shared.data = shared_bytes.data();
  shared.size = launch.shared_bytes;
  shared.name = "shared memory";
  shared.touched.resize(shared_bytes.size());
  shared.undefined.assign(shared_bytes.size(), 1);
  int count = program.num_threads / kLanes;
  published.assign(count, 0);
  for (int index = 0; index < count; ++index) {
    Warp& warp = warps.emplace_back(*this, index);
    for (auto [slot, special] : program.specials) {
      uint32_t* values = warp.as<uint32_t>(slot);
      int which = int(special);
      int same = special <= Special::kThreads  ? program.num_threads
                 : special < Special::kBlocksX ? id[which - int(Special::kBlockX)]
                                               : launch.blocks[which - int(Special::kBlocksX)];
      if (special == Special::kThread)
        for (int lane = 0; lane < kLanes; ++lane) values[lane] = uint32_t(warp.thread(lane));
      else
        std::fill_n(values, kLanes, uint32_t(same));
      warp.undefined[slot] = 0;
    }
  }
}

// Warps take turns of random length between barriers.
inline void Block::run() {
  constexpr uint64_t kMost = 100'000'000;  // instructions of a block
  const uint64_t first = launch.num_instructions;
  std::vector<Warp*> ready;
  for (;;) {
    ready.clear();
    for (Warp& warp : warps)
      if (!warp.is_done() && warp.barrier < 0) ready.push_back(&warp);
    if (ready.empty()) {
      if (warps[0].is_done()) break;
      complete_barrier();
      continue;
    }
    if (launch.num_instructions - first > kMost) throw Fault("endless", "a block does not end");
    Warp& warp = *ready[random() % ready.size()];
    for (unsigned left = 1 + random() % 200; left > 0; --left) {
      warp.step();
      if (warp.is_done() || warp.barrier >= 0) break;
    }
  }
  for (Warp& warp : warps)
    if (!warp.is_done() || warp.num_products != warps[warp.index / 4 * 4].num_products)
      throw Fault("divergence", "warps of a block, or of a warp group, do not do the same");
}

inline void Block::complete_barrier() {
  for (Warp& warp : warps)
    if (warp.is_done() || warp.barrier != warps[0].barrier)
      throw Fault("divergence", "warp " + std::to_string(warp.index) +
                                    " does not come to the barrier that others wait at");
  epoch = ++launch.now;
  for (Warp& warp : warps) {
    warp.barrier = -1;
    published[warp.index] = std::max(published[warp.index], warp.proxy_fence);
  }
}

inline Space& Block::global(uint64_t address, int bytes, const Instruction& at, int64_t& offset) {
  uint64_t buffer = address >> kBufferShift;
  if (buffer >= 1 && buffer <= launch.buffers.size()) {
    Space& space = launch.buffers[buffer - 1];
    offset = int64_t(address & ((uint64_t(1) << kBufferShift) - 1));
    if (offset + bytes <= space.size) return space;
  }
  throw Fault("bounds", where(at) + "outside of every tensor, at byte " +
                            std::to_string(int64_t(address << 24) >> 24) + " of buffer " +
                            std::to_string(buffer));
}

inline void Block::check_shared(int64_t address, int bytes, const Instruction& at) {
  if (address < 0 || address + bytes > shared.size)
    throw Fault("bounds", where(at) + "byte " + std::to_string(address) + " of " +
                              std::to_string(shared.size) + " of shared memory");
}

inline void Block::check_alignment(uint64_t address, int bytes, const Instruction& at) {
  if (address % uint64_t(bytes))
    throw Fault("alignment", where(at) + "the address is no multiple of " + std::to_string(bytes));
}

inline void Block::race(Space& space, int64_t at, const char* what, int thread, int other,
                        bool other_block, const Instruction& by) {
  launch.findings.add(
      "race", by,
      std::string(what) + " byte " + std::to_string(at) + " of " + space.name + ", thread " +
          std::to_string(thread) + ", after " +
          (other == kSeveral ? "several threads" : "thread " + std::to_string(other)) +
          (other_block ? " of another block" : " without a barrier between them"));
}

inline void Block::read(Space& space, int64_t at, int bytes, int thread, const Instruction& by) {
  for (int64_t i = at; i < at + bytes; ++i) {
    Touched& touched = space.touched[i];
    bool other_block = touched.written && touched.written < start;
    if (other_block || (touched.written > epoch && touched.writer != thread))
      race(space, i, "reads", thread, touched.writer, other_block, by);
    bool others = touched.read > epoch && touched.reader != thread;
    touched.reader = others ? kSeveral : uint16_t(thread);
    touched.read = launch.now;
  }
}

inline void Block::write(Space& space, int64_t at, int bytes, int thread,
                         const unsigned char* value, const Instruction& by) {
  for (int64_t i = at; i < at + bytes; ++i) {
    Touched& touched = space.touched[i];
    bool other_block = touched.written && touched.written < start;
    // Threads of a block may write the same: layouts hold a number in several of them.
    bool same = value && space.data[i] == value[i - at];
    if (other_block || (touched.written > epoch && touched.writer != thread && !same))
      race(space, i, "writes", thread, touched.writer, other_block, by);
    other_block = touched.read && touched.read < start;
    if (other_block || (touched.read > epoch && touched.reader != thread))
      race(space, i, "writes", thread, touched.reader, other_block, by);
    if (same && touched.written > epoch && touched.writer != thread) continue;
    touched.writer = uint16_t(thread);
    touched.written = launch.now;
    if (value) space.data[i] = value[i - at];
    if (!space.is_global) space.undefined[i] = value == nullptr;
  }
}

}  // namespace ptx
