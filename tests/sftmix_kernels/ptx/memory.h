// Loads, stores, asynchronous copies, and what moves numbers between registers and lanes.

#pragma once

#include "machine.h"

namespace ptx {

// A number of a register of any width.
inline uint64_t get(Warp& warp, int slot, int lane) {
  switch (warp.block.program.width[slot]) {
    case 0:
      return warp.bits(slot) >> lane & 1;
    case 2:
      return warp.as<uint16_t>(slot)[lane];
    case 4:
      return warp.as<uint32_t>(slot)[lane];
    default:
      return warp.as<uint64_t>(slot)[lane];
  }
}

// Put 32 numbers into a register of any width.
inline void put(Warp& warp, int slot, const uint64_t* values, uint32_t unknown) {
  auto as = [&](auto zero) {
    decltype(zero) narrow[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) narrow[lane] = decltype(zero)(values[lane]);
    warp.write(slot, narrow, unknown);
  };
  switch (warp.block.program.width[slot]) {
    case 2:
      return as(uint16_t());
    case 4:
      return as(uint32_t());
    default:
      return as(uint64_t());
  }
}

inline uint64_t address_of(Warp& warp, const Instruction& at, int operand, int which, int lane) {
  return get(warp, at.registers[operand], lane) + uint64_t(at.offset[which]);
}

inline uint64_t extended(uint64_t value, int bytes, bool is_signed) {
  int shift = 64 - 8 * bytes;
  return is_signed ? uint64_t(int64_t(value << shift) >> shift) : value << shift >> shift;
}

// The address is the last operand.
template <bool is_global>
void load(Warp& warp, const Instruction& at) {
  int address = at.registers.back(), bytes = at.count * at.size;
  warp.require_known(address, at, "an address");
  uint64_t values[4][kLanes];
  uint32_t unknown[4] = {};
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(warp.mask >> lane & 1)) continue;
    uint64_t from = get(warp, address, lane) + uint64_t(at.offset[0]);
    Block::check_alignment(from, bytes, at);
    int64_t start = int64_t(from);
    if (!is_global) warp.block.check_shared(start, bytes, at);
    Space& space = is_global ? warp.block.global(from, bytes, at, start) : warp.block.shared;
    warp.block.read(space, start, bytes, warp.thread(lane), at);
    for (int k = 0; k < at.count; ++k) {
      uint64_t value = 0;
      std::memcpy(&value, space.data + start + k * at.size, at.size);
      values[k][lane] = extended(value, at.size, at.is_signed);
      if (!is_global)
        for (int byte = 0; byte < at.size; ++byte)
          if (space.undefined[start + k * at.size + byte]) unknown[k] |= 1u << lane;
    }
  }
  for (int k = 0; k < at.count; ++k) put(warp, at.registers[k], values[k], unknown[k]);
}

// The address is the first operand.
template <bool is_global>
void store(Warp& warp, const Instruction& at) {
  int address = at.registers[0], bytes = at.count * at.size;
  warp.require_known(address, at, "an address");
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(warp.mask >> lane & 1)) continue;
    uint64_t to = get(warp, address, lane) + uint64_t(at.offset[0]);
    Block::check_alignment(to, bytes, at);
    int64_t start = int64_t(to);
    if (!is_global) warp.block.check_shared(start, bytes, at);
    Space& space = is_global ? warp.block.global(to, bytes, at, start) : warp.block.shared;
    unsigned char values[32];
    for (int k = 0; k < at.count; ++k) {
      uint64_t value = get(warp, at.registers[k + 1], lane);
      std::memcpy(values + k * at.size, &value, at.size);
    }
    warp.block.write(space, start, bytes, warp.thread(lane), values, at);
    for (int k = 0; k < at.count; ++k) {
      if (!(warp.undefined[at.registers[k + 1]] >> lane & 1)) continue;
      if (is_global)
        warp.require_known(at.registers[k + 1], at, "stored");
      else
        std::memset(&space.undefined[start + k * at.size], 1, at.size);
    }
  }
}

inline void load_parameter(Warp& warp, const Instruction& at) {
  for (int k = 0; k < at.count; ++k) {
    uint64_t value = 0, values[kLanes];
    std::memcpy(&value, &warp.block.launch.parameters[at.number + k * at.size], at.size);
    std::fill_n(values, kLanes, extended(value, at.size, at.is_signed));
    put(warp, at.registers[k], values, 0);
  }
}

// Between integers: a number is cut to the smaller type, or continued by the source's sign.
inline void convert(Warp& warp, const Instruction& at) {
  uint64_t values[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    values[lane] = extended(extended(get(warp, at.registers[1], lane), at.size, at.is_signed),
                            at.to, at.number);
  put(warp, at.registers[0], values, warp.undefined[at.registers[1]]);
}

// Until it has landed nobody knows what is at the target.
inline void copy(Warp& warp, const Instruction& at) {
  int bytes = at.number;
  for (size_t k = 0; k < at.registers.size(); ++k) warp.require_known(at.registers[k], at, "used");
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(warp.mask >> lane & 1)) continue;
    Copy one{&at, lane, bytes, bytes, 0, 0, warp.block.launch.now};
    one.target = int64_t(address_of(warp, at, 0, 0, lane));
    one.source = address_of(warp, at, 1, 1, lane);
    if (at.registers.size() > 2) one.from_source = int(get(warp, at.registers[2], lane));
    Block::check_alignment(uint64_t(one.target), bytes, at);
    warp.block.check_shared(one.target, bytes, at);
    if (one.from_source > bytes) throw Fault("bounds", "cp.async of more bytes than there are");
    if (one.from_source) {
      Block::check_alignment(one.source, bytes, at);
      int64_t start;
      Space& space = warp.block.global(one.source, one.from_source, at, start);
      warp.block.read(space, start, one.from_source, warp.thread(lane), at);
    }
    warp.block.write(warp.block.shared, one.target, bytes, warp.thread(lane), nullptr, at);
    warp.copies.open.push_back(one);
  }
}

inline void land(Warp& warp, const Copy& copy) {
  unsigned char bytes[16] = {};
  Block& block = warp.block;
  const Instruction& at = *copy.at;
  auto require_unchanged = [&](Space& space, int64_t start, int size, const char* what) {
    for (int64_t i = start; i < start + size; ++i)
      if (space.touched[i].written > copy.issued) block.launch.findings.add("flight", at, what);
  };
  if (copy.from_source) {
    int64_t start;
    Space& space = block.global(copy.source, copy.from_source, at, start);
    require_unchanged(space, start, copy.from_source, "its source is written before it is read");
    block.read(space, start, copy.from_source, warp.thread(copy.lane), at);
    std::memcpy(bytes, space.data + start, copy.from_source);
  }
  require_unchanged(block.shared, copy.target, copy.bytes, "its target is written before it lands");
  block.write(block.shared, copy.target, copy.bytes, warp.thread(copy.lane), bytes, at);
}

inline void commit_copies(Warp& warp, const Instruction&) { warp.copies.commit(); }

inline void wait_copies(Warp& warp, const Instruction& at) {
  if (at.number < 0) warp.copies.commit();  // wait_all
  while (int(warp.copies.committed.size()) > std::max(at.number, 0)) {
    for (const Copy& one : warp.copies.committed.front()) land(warp, one);
    warp.copies.committed.pop_front();
  }
}

// Move the bits of some registers, side by side, into others: `mov.b32 {%rs1, %rs2}, %r3`.
inline void repack(Warp& warp, const Instruction& at) {
  const int *to = at.registers.data(), *from = to + at.count;
  int sources = int(at.registers.size()) - at.count;
  int bits = 64 / sources * sources == 64 ? at.size * 8 / sources : 0,
      part = at.size * 8 / at.count;
  uint64_t values[4][kLanes];
  uint32_t unknown = 0;
  for (int k = 0; k < sources; ++k) unknown |= warp.undefined[from[k]];
  for (int lane = 0; lane < kLanes; ++lane) {
    uint64_t all = 0;
    for (int k = 0; k < sources; ++k) all |= get(warp, from[k], lane) << (k * bits);
    for (int k = 0; k < at.count; ++k)
      values[k][lane] = extended(all >> (k * part), part / 8, false);
  }
  for (int k = 0; k < at.count; ++k) put(warp, to[k], values[k], unknown);
}

// Eight rows of 16 bytes for each of one, two or four matrices, of which a lane holds two numbers.
template <bool loads>
void move_matrix(Warp& warp, const Instruction& at) {
  int address = loads ? at.registers.back() : at.registers[0];
  const int* slots = at.registers.data() + !loads;
  warp.require_known(address, at, "an address");
  Block& block = warp.block;
  for (int k = 0; k < at.count; ++k) {
    uint32_t values[kLanes] = {}, unknown = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (int half = 0; half < 2; ++half) {
        int row = at.number ? lane % 4 * 2 + half : lane / 4;
        int column = at.number ? lane / 4 : lane % 4 * 2 + half;
        int64_t start = int64_t(get(warp, address, 8 * k + row)) + at.offset[0];
        Block::check_alignment(start, 16, at);
        block.check_shared(start, 16, at);
        start += 2 * column;
        uint16_t value = uint16_t(warp.as<uint32_t>(slots[k])[lane] >> 16 * half);
        if (loads) {
          block.read(block.shared, start, 2, warp.thread(8 * k + row), at);
          std::memcpy(&value, block.shared.data + start, 2);
          values[lane] |= uint32_t(value) << 16 * half;
          if (block.shared.undefined[start] || block.shared.undefined[start + 1])
            unknown |= 1u << lane;
        } else {
          unsigned char bytes[2];
          std::memcpy(bytes, &value, 2);
          block.write(block.shared, start, 2, warp.thread(lane), bytes, at);
          if (warp.undefined[slots[k]] >> lane & 1)
            std::memset(&block.shared.undefined[start], 1, 2);
        }
      }
    }
    if (loads) warp.write(slots[k], values, unknown);
  }
}

enum Shuffle { kUp, kDown, kButterfly, kIndex };

// Operands: target, perhaps whether the lane was in range, value, lane, clamp, members.
inline void shuffle(Warp& warp, const Instruction& at) {
  size_t first = at.count == 2 ? 2 : 1;
  const int* slots = at.registers.data();
  const int* source = slots + first;
  uint32_t* values = warp.as<uint32_t>(source[0]);
  uint32_t result[kLanes], unknown = 0, in_range = 0;
  for (int k = 1; k < 4; ++k) warp.require_known(source[k], at, "decides which lanes meet");
  for (int lane = 0; lane < kLanes; ++lane) {
    int by = int(warp.as<uint32_t>(source[1])[lane] & 31);
    uint32_t clamp = warp.as<uint32_t>(source[2])[lane];
    if (warp.as<uint32_t>(source[3])[lane] != kAllLanes)
      throw Unsupported(at.text + ": shuffles among some lanes");
    int segment = int(clamp >> 8 & 31), last = (lane & segment) | (int(clamp & 31) & ~segment);
    int other = at.number == kUp          ? lane - by
                : at.number == kDown      ? lane + by
                : at.number == kButterfly ? lane ^ by
                                          : (lane & segment) | (by & ~segment);
    bool fits = at.number == kUp ? other >= last : other <= last;
    if (!fits) other = lane;
    result[lane] = values[other];
    unknown |= (warp.undefined[source[0]] >> other & 1) << lane;
    in_range |= uint32_t(fits) << lane;
  }
  warp.write(slots[0], result, unknown);
  if (at.count == 2) warp.write_bits(slots[1], in_range, 0);
}

template <class T, class F>
void reduce(Warp& warp, const Instruction& at) {
  const int* slots = at.registers.data();
  for (int lane = 0; lane < kLanes; ++lane)
    if (warp.as<uint32_t>(slots[2])[lane] != kAllLanes)
      throw Unsupported(at.text + ": reduces some lanes");
  T* values = warp.as<T>(slots[1]);
  T result[kLanes], total = values[0];
  for (int lane = 1; lane < kLanes; ++lane) total = F()(total, values[lane]);
  std::fill_n(result, kLanes, total);
  warp.write(slots[0], result, warp.undefined[slots[1]] ? kAllLanes : 0);
}

enum Vote { kAny, kAll, kBallot };

inline void vote(Warp& warp, const Instruction& at) {
  const int* slots = at.registers.data();
  uint32_t yes = warp.bits(slots[1]), unknown = warp.undefined[slots[1]] ? kAllLanes : 0;
  uint32_t same[kLanes];
  std::fill_n(same, kLanes, yes);
  if (at.number == kBallot) return warp.write(slots[0], same, unknown);
  bool result = at.number == kAny ? yes != 0 : yes == kAllLanes;
  warp.write_bits(slots[0], result ? kAllLanes : 0, unknown);
}

}  // namespace ptx
