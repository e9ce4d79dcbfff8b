// `wgmma`: products of tiles of 64 x N, of which each warp of a group makes 16 rows.
//
// A product reads shared memory and writes its registers when it is waited for, the latest moment
// that the ISA allows. A left operand in registers is read at once: where they are written too
// early, ptxas waits for the product first (seen in SASS), which costs time and is reported. Sums
// of 16 products are exact, then rounded once: what hardware does to them is not documented.

#pragma once

#include "arithmetic.h"
#include "machine.h"

namespace ptx {

constexpr int kDepth = 16;

// Where numbers of an operand in shared memory are, by a descriptor (PTX ISA, "matrix descriptor").
struct Operand {
  Operand(uint64_t descriptor, bool is_transposed_) : is_transposed(is_transposed_) {
    start = int64_t(descriptor & 0x3fff) << 4;
    leading = int64_t(descriptor >> 16 & 0x3fff) << 4;
    stride = int64_t(descriptor >> 32 & 0x3fff) << 4;
    if (descriptor >> 49 & 7) throw Unsupported("a descriptor with a base offset");
    // 128, 64 or 32 bytes, swizzled, or 16, not swizzled
    const int widths[] = {16, 128, 64, 32};
    width = widths[descriptor >> 62];
  }

  // `outer` is the row of the left operand or the column of the right one; `depth` < 16 adds up.
  int64_t address(int outer, int depth) const {
    int64_t at;
    if (width == 16 && !is_transposed)
      at = outer / 8 * stride + depth / 8 * leading + outer % 8 * 16 + depth % 8 * 2;
    else if (width == 16)
      at = outer / 8 * stride + depth / 8 * leading + depth % 8 * 16 + outer % 8 * 2;
    else if (!is_transposed)
      at = outer / 8 * stride + outer % 8 * width + depth * 2;
    else
      at = outer % (width / 2) * 2 + outer / (width / 2) * leading + depth / 8 * stride +
           depth % 8 * width;
    at += start;
    return at ^ ((at >> 7 & (width / 16 - 1)) << 4);
  }

  int64_t start, leading, stride;
  int width;
  bool is_transposed;
};

// 16 columns of an operand as float32, and which of its numbers are undefined.
struct Tile {
  std::vector<float> values;
  std::vector<unsigned char> unknown;
  bool any_unknown = false;
};

inline float number(uint16_t bits, bool is_half) {
  return is_half ? to_float(Half{bits}) : to_float(Bfloat{bits});
}

// Call `use` with each row, depth and address of an operand.
template <class F>
void each(const Operand& operand, int first, int count, F use) {
  for (int row = 0; row < count; ++row)
    for (int depth = 0; depth < kDepth; ++depth)
      use(row * kDepth + depth, operand.address(first + row, depth));
}

// When it is issued: what it will read must have been made known to the async proxy, and nobody may
// write it any more.
inline void announce(Warp& warp, const Instruction& at, const Operand& operand, int first,
                     int count) {
  Block& block = warp.block;
  each(operand, first, count, [&](int, int64_t start) {
    block.check_shared(start, 2, at);
    const Touched& touched = block.shared.touched[start];
    int writer = touched.writer / kLanes;
    bool fenced = touched.written <= block.published[writer] ||
                  touched.written < warp.proxy_fence_epoch ||
                  (writer == warp.index && touched.written <= warp.proxy_fence);
    if (!fenced)
      block.launch.findings.add("fence", at,
                                "fence.proxy.async is missing before it reads byte " +
                                    std::to_string(start) + " of shared memory");
    block.read(block.shared, start, 2, warp.thread(0), at);
  });
}

inline Tile tile(Warp& warp, const Product& product, const Operand& operand, int first, int count) {
  Block& block = warp.block;
  Tile result{std::vector<float>(count * kDepth), std::vector<unsigned char>(count * kDepth),
              false};
  each(operand, first, count, [&](int at, int64_t start) {
    if (block.shared.touched[start].written > product.issued)
      block.launch.findings.add("flight", *product.at, "its operand is written while it reads it");
    uint16_t bits;
    std::memcpy(&bits, block.shared.data + start, 2);
    result.values[at] = number(bits, product.at->other);
    result.unknown[at] = block.shared.undefined[start] | block.shared.undefined[start + 1];
    result.any_unknown |= result.unknown[at];
  });
  return result;
}

// The left operand from four registers.
inline Tile tile_of_registers(Warp& warp, const Product& product) {
  Tile result{std::vector<float>(16 * kDepth), std::vector<unsigned char>(16 * kDepth), false};
  for (int k = 0; k < 4; ++k) {
    int slot = product.at->registers[product.at->count + k];
    if (warp.written[slot] > product.issued)
      warp.block.launch.findings.add(
          "overwritten", *product.at,
          warp.block.program.names[slot] + " is written before this is waited for");
    for (int lane = 0; lane < kLanes; ++lane)
      for (int half = 0; half < 2; ++half) {
        int at = (lane / 4 + k % 2 * 8) * kDepth + lane % 4 * 2 + k / 2 * 8 + half;
        uint32_t bits = product.fragment[k * kLanes + lane];
        result.values[at] = number(uint16_t(bits >> 16 * half), product.at->other);
      }
  }
  return result;
}

// Instruction: `count` accumulators; `to` 4 where the left operand is in registers, else 1;
// `number` whether left (1) or right (2) is transposed; `other` says float16.
inline void issue_product(Warp& warp, const Instruction& at) {
  int columns = at.count * 2;
  const int* slots = at.registers.data() + at.count;
  Findings& findings = warp.block.launch.findings;
  Product product{&at, 0, 0, false, warp.block.launch.now, {}};
  auto descriptor = [&](int slot) {
    warp.require_known(slot, at, "a descriptor");
    uint64_t value = warp.as<uint64_t>(slot)[0];
    for (int lane = 1; lane < kLanes; ++lane)
      if (warp.as<uint64_t>(slot)[lane] != value)
        throw Fault("divergence", where(at) + "lanes have different descriptors");
    return value;
  };
  if (at.to == 1) {
    product.left = descriptor(slots[0]);
    announce(warp, at, Operand(product.left, at.number & 1), warp.index % 4 * 16, 16);
  }
  for (int k = 0; at.to == 4 && k < 4; ++k) {
    warp.require_known(slots[k], at, "an operand");
    const uint32_t* bits = warp.as<uint32_t>(slots[k]);
    product.fragment.insert(product.fragment.end(), bits, bits + kLanes);
  }
  product.right = descriptor(slots[at.to]);
  announce(warp, at, Operand(product.right, at.number & 2), 0, columns);
  warp.require_known(slots[at.to + 1], at, "says whether it adds");
  product.accumulates = warp.bits(slots[at.to + 1]) == kAllLanes;
  for (int k = 0; k < at.count + (at.to == 4 ? 4 : 0); ++k) {
    int slot = at.registers[k];
    if (!warp.in_flight[slot] && warp.written[slot] > warp.register_fence)
      findings.add(
          "fence", at,
          "wgmma.fence is missing after " + warp.block.program.names[slot] + " was written");
    if (k >= at.count) continue;
    if (!warp.in_flight[slot]++) warp.before[slot] = warp.undefined[slot];
    warp.undefined[slot] = kAllLanes;
  }
  warp.products.open.push_back(product);
  ++warp.num_products;
}

inline void finish_product(Warp& warp, const Product& product) {
  const Instruction& at = *product.at;
  int columns = at.count * 2;
  Tile left = at.to == 4 ? tile_of_registers(warp, product)
                         : tile(warp, product, Operand(product.left, at.number & 1),
                                warp.index % 4 * 16, 16);
  Tile right = tile(warp, product, Operand(product.right, at.number & 2), 0, columns);
  // Depth by depth, columns side by side.
  std::vector<float> across(columns * kDepth);
  for (int column = 0; column < columns; ++column)
    for (int depth = 0; depth < kDepth; ++depth)
      across[depth * columns + column] = right.values[column * kDepth + depth];
  std::vector<double> sums(columns);
  for (int row = 0; row < 16; ++row) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int depth = 0; depth < kDepth; ++depth) {
      double factor = left.values[row * kDepth + depth];
      for (int column = 0; column < columns; ++column)
        sums[column] += factor * across[depth * columns + column];
    }
    for (int column = 0; column < columns; ++column) {
      int slot = at.registers[column / 8 * 4 + row / 8 * 2 + column % 2];
      int lane = row % 8 * 4 + column % 8 / 2;
      float& total = warp.as<float>(slot)[lane];
      total = float((product.accumulates ? double(total) : 0.0) + sums[column]);
      bool unknown = product.accumulates && (warp.before[slot] >> lane & 1);
      if (left.any_unknown || right.any_unknown)
        for (int depth = 0; depth < kDepth; ++depth)
          unknown |= left.unknown[row * kDepth + depth] || right.unknown[column * kDepth + depth];
      warp.before[slot] = (warp.before[slot] & ~(1u << lane)) | uint32_t(unknown) << lane;
    }
  }
  for (int k = 0; k < at.count; ++k) {
    int slot = at.registers[k];
    if (!--warp.in_flight[slot]) warp.undefined[slot] = warp.before[slot];
  }
}

inline void commit_products(Warp& warp, const Instruction&) { warp.products.commit(); }

inline void wait_products(Warp& warp, const Instruction& at) {
  while (int(warp.products.committed.size()) > at.number) {
    for (const Product& one : warp.products.committed.front()) finish_product(warp, one);
    warp.products.committed.pop_front();
  }
}

inline void fence_registers(Warp& warp, const Instruction&) {
  warp.register_fence = warp.block.launch.now;
}

inline void fence_proxy(Warp& warp, const Instruction&) {
  warp.proxy_fence = warp.block.launch.now;
  warp.proxy_fence_epoch = warp.block.epoch;
}

}  // namespace ptx
