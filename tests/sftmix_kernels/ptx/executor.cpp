// Runs the PTX that Triton and nvcc compile for sm_90a, on CPU memory: see `executor.py`.
//
// What an opcode means: arithmetic.h, memory.h, products.h; `decode` below finds it. An opcode that
// none of them knows is an error.

#include <cstdio>
#include <memory>

#include "arithmetic.h"
#include "machine.h"
#include "memory.h"
#include "products.h"
#include "program.h"

namespace ptx {
namespace {

void branch(Warp& warp, const Instruction& at) {
  uint32_t taken = warp.mask, left = warp.active & ~taken;
  if (taken && left) {
    warp.elsewhere.push_back({at.target, taken, false});
    warp.active = left;
    ++warp.pc;
  } else {
    warp.pc = taken ? at.target : warp.pc + 1;
  }
  if (!warp.elsewhere.empty()) warp.settle();
}

void end(Warp& warp, const Instruction&) {
  warp.active &= ~warp.mask;
  ++warp.pc;
  warp.settle();
}

void wait_at_barrier(Warp& warp, const Instruction& at) { warp.barrier = at.number; }

using Operands = std::vector<std::string>;

bool starts(const std::string& text, const std::string& with) { return text.rfind(with, 0) == 0; }

bool is_integer(const std::string& type) { return type[0] == 's' || type[0] == 'u'; }

// What comes once: opcode, handler, whether all lanes must be there.
struct Plain {
  Handler run;
  bool is_collective;
};
const std::unordered_map<std::string, Plain> kPlain = {
    {"cp.async.commit_group", {commit_copies, true}},
    {"wgmma.commit_group.sync.aligned", {commit_products, true}},
    {"wgmma.fence.sync.aligned", {fence_registers, true}},
    {"fence.proxy.async.shared::cta", {fence_proxy, false}},
    {"fence.proxy.async", {fence_proxy, false}},
};

void decode_memory(Parser& parser, Instruction& at, const std::vector<std::string>& parts,
                   const Operands& operands) {
  bool loads = parts[0] == "ld";
  const std::string &registers = operands.at(loads ? 0 : 1), &address = operands.at(loads ? 1 : 0);
  const std::string& type = parts.back();
  at.size = bytes_of(type);
  at.is_signed = type[0] == 's';
  for (size_t i = 2; i + 1 < parts.size(); ++i) {
    static const std::set<std::string> hints = {
        "nc", "L1::no_allocate", "L1::evict_last", "L1::evict_first", "relaxed", "cta", "volatile"};
    if (parts[i] == "v2" || parts[i] == "v4")
      at.count = parts[i][1] - '0';
    else if (!hints.count(parts[i]))
      throw Unsupported("." + parts[i]);
  }
  Operands list = Parser::list(registers);
  if (int(list.size()) != at.count) throw Unsupported("the number of registers");
  int narrow = at.size == 1 ? 2 : at.size;
  if (!loads) at.registers.push_back(parser.address(address, at.offset[0]));
  for (const std::string& one : list) {
    bool is_register = one[0] == '%' || std::isalpha(one[0]);
    int slot = parser.operand(one, is_register ? -1 : narrow);
    if (parser.program.width[slot] < narrow) throw Unsupported("a register too narrow");
    at.registers.push_back(slot);
  }
  if (loads) at.registers.push_back(parser.address(address, at.offset[0]));
  if (parts[1] == "global")
    at.run = loads ? load<true> : store<true>;
  else if (parts[1] == "shared" || parts[1] == "shared::cta")
    at.run = loads ? load<false> : store<false>;
  else
    throw Unsupported("memory other than global and shared");
}

void decode_parameter(Parser& parser, Instruction& at, const std::string& type,
                      const Operands& operands) {
  std::string name = trim(operands.at(1).substr(1, operands[1].size() - 2));
  size_t plus = name.find('+');
  int offset = plus == std::string::npos ? 0 : std::atoi(name.c_str() + plus + 1);
  at.size = bytes_of(type);
  at.is_signed = type[0] == 's';
  for (const std::string& one : Parser::list(operands[0]))
    at.registers.push_back(parser.operand(one, -1));
  at.count = int(at.registers.size());
  at.run = load_parameter;
  for (const Parameter& one : parser.program.parameters)
    if (one.name == name.substr(0, plus)) {
      if (offset + at.count * at.size > one.size) throw Unsupported("behind the parameter's end");
      at.number = one.offset + offset;
      return;
    }
  throw Unsupported("no parameter " + name);
}

void decode_move(Parser& parser, Instruction& at, const std::string& type,
                 const Operands& operands) {
  at.size = bytes_of(type);
  Operands to = Parser::list(operands.at(0)), from = Parser::list(operands.at(1));
  at.count = int(to.size());
  for (const std::string& one : to) at.registers.push_back(parser.operand(one, at.size / at.count));
  for (const std::string& one : from)
    at.registers.push_back(parser.operand(one, at.size / int(from.size())));
  auto same = [](auto a) { return a; };
  if (to.size() > 1 || from.size() > 1)
    at.run = repack;
  else if (at.size == 2)
    at.run = entry<uint16_t, uint16_t>(same).run;
  else if (at.size == 4)
    at.run = entry<uint32_t, uint32_t>(same).run;
  else
    at.run = entry<uint64_t, uint64_t>(same).run;
}

void decode_shuffle(Parser& parser, Instruction& at, const std::string& mode,
                    const Operands& operands) {
  const std::map<std::string, int> modes = {
      {"up", kUp}, {"down", kDown}, {"bfly", kButterfly}, {"idx", kIndex}};
  at.number = modes.at(mode);
  at.run = shuffle;
  at.is_collective = true;
  Operands to = split(operands.at(0), '|');
  at.count = int(to.size());
  at.registers.push_back(parser.operand(trim(to[0]), 4));
  if (at.count == 2) at.registers.push_back(parser.operand(trim(to[1]), 0));
  for (size_t k = 1; k < 5; ++k) at.registers.push_back(parser.operand(operands.at(k), 4));
}

// wgmma.mma_async.sync.aligned.m64nNk16.f32.bf16.bf16 {accumulators}, left, right, adds, 1, 1, ..
void decode_product(Parser& parser, Instruction& at, const std::vector<std::string>& parts,
                    const Operands& operands) {
  const std::string &shape = parts.at(4), &type = parts.at(6);
  bool fits = starts(shape, "m64n") && shape.substr(shape.size() - 3) == "k16" &&
              parts.at(5) == "f32" && parts.at(7) == type && (type == "f16" || type == "bf16");
  if (!fits) throw Unsupported("a product of this shape or type");
  Operands totals = Parser::list(operands.at(0)), left = Parser::list(operands.at(1));
  at.count = int(totals.size());
  at.to = int(left.size());
  if (at.count * 2 != std::atoi(shape.c_str() + 4) || (at.to != 1 && at.to != 4))
    throw Unsupported("the number of registers");
  for (const std::string& one : totals) at.registers.push_back(parser.operand(one, 4));
  for (const std::string& one : left)
    at.registers.push_back(parser.operand(one, at.to == 4 ? 4 : 8));
  at.registers.push_back(parser.operand(operands.at(2), 8));
  at.registers.push_back(parser.operand(operands.at(3), 0));
  if (operands.at(4) != "1" || operands.at(5) != "1") throw Unsupported("a negated operand");
  size_t transposed = at.to == 4 ? 6 : 7;
  at.number =
      (operands.at(transposed) == "1" ? 2 : 0) | (at.to == 1 && operands.at(6) == "1" ? 1 : 0);
  at.other = type == "f16";
  at.run = issue_product;
}

template <class T, class F>
Handler reduction(F) {
  return reduce<T, F>;
}

bool decode_collective(Parser& parser, Instruction& at, const std::string& opcode,
                       const std::vector<std::string>& parts, const Operands& operands) {
  static const std::unordered_map<std::string, Handler> reductions = {
      {"redux.sync.max.s32", reduction<int32_t>([](auto a, auto b) { return std::max(a, b); })},
      {"redux.sync.min.s32", reduction<int32_t>([](auto a, auto b) { return std::min(a, b); })},
      {"redux.sync.max.u32", reduction<uint32_t>([](auto a, auto b) { return std::max(a, b); })},
      {"redux.sync.min.u32", reduction<uint32_t>([](auto a, auto b) { return std::min(a, b); })},
      {"redux.sync.add.s32", reduction<int32_t>([](auto a, auto b) { return a + b; })},
      {"redux.sync.add.u32", reduction<uint32_t>([](auto a, auto b) { return a + b; })},
      {"redux.sync.or.b32", reduction<uint32_t>([](auto a, auto b) { return a | b; })},
      {"redux.sync.and.b32", reduction<uint32_t>([](auto a, auto b) { return a & b; })}};
  static const std::unordered_map<std::string, int> votes = {{"vote.sync.any.pred", kAny},
                                                             {"vote.sync.all.pred", kAll},
                                                             {"vote.sync.ballot.b32", kBallot}};
  at.is_collective = true;
  if (auto found = reductions.find(opcode); found != reductions.end()) {
    at.run = found->second;
    for (const std::string& one : operands) at.registers.push_back(parser.operand(one, 4));
  } else if (auto ballot = votes.find(opcode); ballot != votes.end()) {
    at.run = vote;
    at.number = ballot->second;
    at.registers = {parser.operand(operands.at(0), at.number == kBallot ? 4 : 0),
                    parser.operand(operands.at(1), 0)};
    if (std::stoll(operands.at(2), nullptr, 0) != -1 && operands[2] != "0xffffffff")
      throw Unsupported("a vote of some lanes");
  } else if (starts(opcode, "shfl.sync.") && parts.back() == "b32") {
    decode_shuffle(parser, at, parts.at(2), operands);
  } else if ((starts(opcode, "ldmatrix.sync.aligned.m8n8.x") ||
              starts(opcode, "stmatrix.sync.aligned.m8n8.x")) &&
             parts.back() == "b16") {
    bool loads = parts[0] == "ldmatrix";
    Operands list = Parser::list(operands.at(loads ? 0 : 1));
    at.count = int(list.size());
    int address = parser.address(operands.at(loads ? 1 : 0), at.offset[0]);
    if (!loads) at.registers.push_back(address);
    for (const std::string& one : list) at.registers.push_back(parser.operand(one, 4));
    if (loads) at.registers.push_back(address);
    at.number = opcode.find(".trans.") != std::string::npos;
    at.run = loads ? move_matrix<true> : move_matrix<false>;
  } else if (starts(opcode, "wgmma.mma_async.sync.aligned.")) {
    decode_product(parser, at, parts, operands);
  } else if (opcode == "wgmma.wait_group.sync.aligned") {
    at.run = wait_products;
    at.number = std::stoi(operands.at(0), nullptr, 0);
  } else if (opcode == "cp.async.wait_group" || opcode == "cp.async.wait_all") {
    at.run = wait_copies;
    at.number = operands.empty() ? -1 : std::stoi(operands[0], nullptr, 0);
  } else if ((opcode == "bar.sync" || opcode == "barrier.sync" ||
              opcode == "barrier.sync.aligned") &&
             operands.size() == 1) {
    at.run = wait_at_barrier;
    at.number = std::stoi(operands[0], nullptr, 0);
  } else {
    at.is_collective = false;
  }
  return at.is_collective;
}

}  // namespace

void decode(Parser& parser, Instruction& at, const std::string& opcode, const Operands& operands) {
  static const Table table = arithmetic();
  std::vector<std::string> parts = split(opcode, '.');
  if (auto found = table.find(opcode); found != table.end()) {
    at.run = found->second.run;
    const std::vector<int>& widths = found->second.widths;
    if (widths.size() != operands.size()) throw Unsupported("the number of operands");
    for (size_t k = 0; k < widths.size(); ++k)
      at.registers.push_back(parser.operand(operands[k], widths[k]));
  } else if (auto plain = kPlain.find(opcode); plain != kPlain.end()) {
    at.run = plain->second.run;
    at.is_collective = plain->second.is_collective;
  } else if (starts(opcode, "ld.param.")) {
    decode_parameter(parser, at, parts.back(), operands);
  } else if (parts[0] == "ld" || parts[0] == "st") {
    decode_memory(parser, at, parts, operands);
  } else if (parts[0] == "mov") {
    decode_move(parser, at, parts.back(), operands);
  } else if (parts[0] == "cvt" && parts.size() == 3 && is_integer(parts[1]) &&
             is_integer(parts[2])) {
    at.to = bytes_of(parts[1]);
    at.number = parts[1][0] == 's';
    at.size = bytes_of(parts[2]);
    at.is_signed = parts[2][0] == 's';
    for (const std::string& one : operands) at.registers.push_back(parser.operand(one, -1));
    at.run = convert;
  } else if (starts(opcode, "cp.async.ca.shared.global") ||
             starts(opcode, "cp.async.cg.shared.global")) {
    if (parts.size() != 5) throw Unsupported("." + parts.back());
    at.registers = {parser.address(operands.at(0), at.offset[0]),
                    parser.address(operands.at(1), at.offset[1])};
    at.number = std::stoi(operands.at(2), nullptr, 0);
    if (operands.size() > 3) at.registers.push_back(parser.operand(operands[3], 4));
    at.run = copy;
  } else if (opcode == "cvta.to.global.u64") {
    at.registers = {parser.operand(operands.at(0), 8), parser.operand(operands.at(1), 8)};
    at.run = entry<uint64_t, uint64_t>([](uint64_t a) { return a; }).run;
  } else if (opcode == "bra" || opcode == "bra.uni") {
    at.target = parser.label(operands.at(0));
    at.run = branch;
    at.decides = true;
  } else if (opcode == "ret" || opcode == "exit") {
    at.run = end;
    at.decides = true;
  } else if (!decode_collective(parser, at, opcode, parts, operands)) {
    throw Unsupported("an instruction that the executor does not know");
  }
}

namespace {

// Results cross to Python as lines of text.
void say(char* answer, int64_t size, const std::string& text) {
  std::snprintf(answer, size, "%s", text.c_str());
}

}  // namespace
}  // namespace ptx

struct Buffer {
  void* data;
  int64_t size;
  const char* name;
};

extern "C" {

// Returns a program to launch, or null, with the reason in `answer`.
void* ptx_load(const char* text, const char* entry, char* answer, int64_t size) {
  try {
    return new ptx::Program(std::move(ptx::Parser(text, entry).program));
  } catch (const std::exception& error) {
    ptx::say(answer, size, error.what());
    return nullptr;
  }
}

void ptx_free(void* program) { delete static_cast<ptx::Program*>(program); }

// Runs all blocks, one after the other, and returns the number of warp instructions. What is wrong
// is in `answer`, a line of kind, tab and message for each.
uint64_t ptx_launch(void* loaded, const int* blocks, const uint64_t* words, int num_words,
                    const Buffer* buffers, int num_buffers, int shared_bytes, unsigned seed,
                    char* answer, int64_t size) {
  const ptx::Program& program = *static_cast<ptx::Program*>(loaded);
  ptx::Launch launch{program, {}, {}, {blocks[0], blocks[1], blocks[2]}, 0, {}};
  try {
    if (program.num_threads % ptx::kLanes) throw ptx::Unsupported("half a warp");
    launch.parameters.resize(program.parameter_bytes);
    // Each parameter takes as many whole words as it has bytes for.
    int word = 0;
    for (const ptx::Parameter& one : program.parameters) {
      if (word + (one.size + 7) / 8 > num_words) throw ptx::Unsupported("too few parameters");
      std::memcpy(&launch.parameters[one.offset], &words[word], one.size);
      word += (one.size + 7) / 8;
    }
    if (word != num_words) throw ptx::Unsupported("too many parameters");
    for (int k = 0; k < num_buffers; ++k) {
      ptx::Space space{static_cast<unsigned char*>(buffers[k].data),
                       buffers[k].size,
                       true,
                       buffers[k].name,
                       {},
                       {}};
      space.touched.resize(buffers[k].size);
      launch.buffers.push_back(std::move(space));
    }
    launch.shared_bytes = program.static_shared + shared_bytes;
    for (int z = 0; z < blocks[2]; ++z)
      for (int y = 0; y < blocks[1]; ++y)
        for (int x = 0; x < blocks[0]; ++x) ptx::Block(launch, {x, y, z}, seed++).run();
  } catch (const ptx::Fault& fault) {
    launch.findings.all.emplace_back(fault.kind, fault.what());
  } catch (const std::exception& error) {
    launch.findings.all.emplace_back("unsupported", error.what());
  }
  std::string text;
  for (const auto& [kind, message] : launch.findings.all) text += kind + "\t" + message + "\n";
  ptx::say(answer, size, text);
  return launch.num_instructions;
}

}  // extern "C"
