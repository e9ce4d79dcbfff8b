// A kernel's PTX as a list of decoded instructions. Nothing is parsed while it runs.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

// What makes a text that this executor cannot run an error, never a guess.
struct Unsupported : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&);

// One register of a warp: 32 numbers of its width, side by side, or one bit for each lane.
struct alignas(64) Register {
  unsigned char bytes[kLanes * 8];

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(bytes);
  }
};

struct Instruction {
  Handler run = nullptr;
  int guard = -1;  // a predicate's register, of `@%p`
  bool guard_is_negated = false;
  bool is_collective = false;       // all lanes of the warp must be there
  bool decides = false;             // sets the program counter by itself
  std::vector<int> registers;       // operands in their order, those in braces one by one
  std::array<int64_t, 2> offset{};  // of the first and of the second address
  int target = -1;                  // of a branch
  int count = 1, size = 0,
      to = 0;  // of a load or store: registers, bytes of each, register's bytes
  bool is_signed = false;
  int number = 0, other = 0;  // what else a handler needs to know
  int line = 0;
  std::string text;
};

// Where it is, for messages.
inline std::string where(const Instruction& at) {
  return "line " + std::to_string(at.line) + ": `" + at.text.substr(0, 90) + "`: ";
}

enum class Special { kThread, kThreads, kBlockX, kBlockY, kBlockZ, kBlocksX, kBlocksY, kBlocksZ };

// A register that has its value from the start.
struct Constant {
  int slot, width;
  uint64_t value;
};

struct Parameter {
  std::string name;
  int offset, size;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<int> width;  // bytes of each register, 0 of a predicate
  std::vector<std::string> names;
  std::vector<Constant> constants;
  std::vector<std::pair<int, Special>> specials;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0, num_threads = 0, static_shared = 0;
};

// The part of an opcode between its dots.
inline std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == at)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

inline std::string trim(const std::string& text) {
  const char* blank = " \t\r\n";
  size_t first = text.find_first_not_of(blank), last = text.find_last_not_of(blank);
  return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

// Bytes of a type such as b32, and 0 of a predicate.
inline int bytes_of(const std::string& type) {
  static const std::map<std::string, int> odd = {
      {"pred", 0}, {"bf16", 2}, {"f16x2", 4}, {"bf16x2", 4}};
  if (auto found = odd.find(type); found != odd.end()) return found->second;
  int bits = 0;
  if (type.size() > 1 && std::string("bsuf").find(type[0]) != std::string::npos)
    bits = std::atoi(type.c_str() + 1);
  if (bits != 8 && bits != 16 && bits != 32 && bits != 64) throw Unsupported("type ." + type);
  return bits / 8;
}

// Turns a kernel's text into a program. `instructions.h` says what each opcode means.
class Parser {
 public:
  Parser(const std::string& text, const std::string& entry) { parse(text, entry); }

  Program program;

  // The register of an operand: one that was declared, or one that holds a constant. Its width must
  // be what the instruction takes; `width` -1 takes any.
  int operand(const std::string& text, int width) {
    if (text.empty()) throw Unsupported("an operand is missing");
    int slot = find(text);
    if (slot < 0) return constant(text, width);
    if (width >= 0 && program.width[slot] != width)
      throw Unsupported(text + " has " + std::to_string(8 * program.width[slot]) + " bits, not " +
                        std::to_string(8 * width));
    return slot;
  }

  // `[register + offset]`, `[shared_symbol]`
  int address(const std::string& text, int64_t& offset) {
    if (text.size() < 2 || text.front() != '[' || text.back() != ']')
      throw Unsupported("expected an address, got " + text);
    std::string inside = trim(text.substr(1, text.size() - 2));
    size_t plus = inside.find('+');
    offset = plus == std::string::npos ? 0 : std::stoll(trim(inside.substr(plus + 1)), nullptr, 0);
    std::string base = trim(inside.substr(0, plus));
    int slot = find(base);
    return slot >= 0 ? slot : constant(base, 8);
  }

  // `{a, b}`, or one operand
  static std::vector<std::string> list(const std::string& text) {
    if (text.empty() || text.front() != '{') return {text};
    std::vector<std::string> parts;
    for (const std::string& part : split(text.substr(1, text.size() - 2), ','))
      parts.push_back(trim(part));
    return parts;
  }

  int label(const std::string& name) const {
    auto found = labels_.find(name);
    if (found == labels_.end()) throw Unsupported("no label " + name);
    return found->second;
  }

 private:
  struct Statement {
    int line;
    std::string guard, opcode;
    std::vector<std::string> operands;
    std::string text;
    int scope;
  };

  // The registers that a block in braces declares.
  struct Scope {
    int parent;
    std::unordered_map<std::string, int> registers;
  };

  void parse(const std::string& text, const std::string& entry);
  void parse_head(const std::string& head);
  void parse_body(const std::string& body, int line);
  void declare(const std::string& statement);
  void statement(const std::string& text, int line);
  void decode(const Statement& statement);

  int find(const std::string& name) {
    for (int at = scope_; at >= 0; at = scopes_[at].parent)
      if (auto found = scopes_[at].registers.find(name); found != scopes_[at].registers.end())
        return found->second;
    return -1;
  }

  int add(const std::string& name, int width) {
    program.width.push_back(width);
    program.names.push_back(name);
    return int(program.width.size()) - 1;
  }

  int constant(const std::string& text, int width) {
    static const std::map<std::string, Special> specials = {
        {"%tid.x", Special::kThread},     {"%ntid.x", Special::kThreads},
        {"%ctaid.x", Special::kBlockX},   {"%ctaid.y", Special::kBlockY},
        {"%ctaid.z", Special::kBlockZ},   {"%nctaid.x", Special::kBlocksX},
        {"%nctaid.y", Special::kBlocksY}, {"%nctaid.z", Special::kBlocksZ}};
    auto key = std::make_pair(text, width);
    if (auto found = constants_.find(key); found != constants_.end()) return found->second;
    int slot = add(text, width);
    constants_[key] = slot;
    if (auto special = specials.find(text); special != specials.end()) {
      if (width != 4) throw Unsupported(text + " has 32 bits");
      program.specials.emplace_back(slot, special->second);
    } else if (auto symbol = shared_.find(text); symbol != shared_.end()) {
      program.constants.push_back({slot, width, uint64_t(symbol->second)});
    } else {
      program.constants.push_back({slot, width, number(text)});
    }
    return slot;
  }

  static uint64_t number(const std::string& text) {
    size_t used = 0;
    uint64_t value = 0;
    try {
      if (text.size() > 2 && text[0] == '0' && std::strchr("fFdD", text[1])) {
        value = std::stoull(text.substr(2), &used, 16);
        used += 2;
      } else if (text[0] == '-') {
        value = uint64_t(std::stoll(text, &used, 0));
      } else {
        value = std::stoull(text, &used, 0);
      }
      if (used < text.size() && text[used] == 'U') ++used;
    } catch (const std::logic_error&) {
      used = 0;
    }
    if (used != text.size() || text.empty()) throw Unsupported("operand " + text);
    return value;
  }

  void open_scope() {
    scopes_.push_back({scope_, {}});
    scope_ = int(scopes_.size()) - 1;
  }

  std::vector<Scope> scopes_;
  int scope_ = -1;
  std::map<std::pair<std::string, int>, int> constants_;
  std::map<std::string, int> labels_, shared_;
  std::vector<Statement> statements_;
};

// Fills an instruction from its opcode and operands, or throws `Unsupported`.
void decode(Parser& parser, Instruction& instruction, const std::string& opcode,
            const std::vector<std::string>& operands);

inline void Parser::parse(const std::string& text, const std::string& entry) {
  program.name = entry;
  size_t start = text.find(".entry " + entry + "(");
  if (start == std::string::npos) throw Unsupported("no kernel " + entry);
  size_t open = text.find("\n{", start), end = open + 2;
  for (int depth = 1; depth > 0; ++end) {
    if (end >= text.size()) throw Unsupported("the kernel has no end");
    if (text[end] == '{') ++depth;
    if (text[end] == '}') --depth;
  }
  open_scope();
  int line = 1 + int(std::count(text.begin(), text.begin() + long(open) + 2, '\n'));
  parse_head(text.substr(start, open - start));
  size_t dynamic = text.find(".extern .shared");
  if (dynamic != std::string::npos && dynamic < start) {
    std::string declared = text.substr(dynamic, text.find(';', dynamic) - dynamic);
    size_t name = declared.rfind(' ') + 1;
    shared_[declared.substr(name, declared.find('[') - name)] = 0;
  }
  parse_body(text.substr(open + 2, end - open - 3), line);
  for (const Statement& one : statements_) decode(one);
}

inline void Parser::parse_head(const std::string& head) {
  size_t close = head.find(')');
  std::string inside = head.substr(head.find('(') + 1, close - head.find('(') - 1);
  for (const std::string& one : split(inside, ',')) {
    std::vector<std::string> words = split(trim(one), ' ');
    if (words[0] != ".param") continue;
    // .param .u64 name, or .param .align 8 .b8 name[80]
    size_t bracket = words.back().find('[');
    bool is_struct = bracket != std::string::npos;
    int size =
        is_struct ? std::atoi(words.back().c_str() + bracket + 1) : bytes_of(words.at(1).substr(1));
    int align = is_struct ? 8 : size;
    int offset = (program.parameter_bytes + align - 1) / align * align;
    program.parameters.push_back({words.back().substr(0, bracket), offset, size});
    program.parameter_bytes = offset + size;
  }
  size_t threads = head.find(".reqntid ");
  if (threads == std::string::npos) threads = head.find(".maxntid ");
  if (threads == std::string::npos) throw Unsupported("no number of threads");
  program.num_threads = std::atoi(head.c_str() + threads + 9);
}

inline void Parser::parse_body(const std::string& body, int line) {
  std::string current;
  int first = line, braces = 0;
  auto finish = [&] {
    statement(trim(current), first);
    current.clear();
  };
  for (size_t at = 0; at < body.size(); ++at) {
    char c = body[at];
    if (c == '/' && at + 1 < body.size() && body[at + 1] == '/') {
      while (at < body.size() && body[at] != '\n') ++at;
      c = '\n';
    }
    if (c == '\n') {
      ++line;
      // A directive that ends with its line.
      std::string so_far = trim(current);
      if (so_far.rfind(".loc", 0) == 0) current.clear();
      current += ' ';
    } else if (c == '{' && trim(current).empty()) {
      open_scope();
    } else if (c == '}' && braces == 0) {
      if (!trim(current).empty()) finish();
      scope_ = scopes_[scope_].parent;
    } else if (c == ';') {
      finish();
    } else if (c == ':' && trim(current).find_first_of(" :[{%") == std::string::npos &&
               (at + 1 >= body.size() || body[at + 1] != ':')) {
      labels_[trim(current)] = int(statements_.size());
      current.clear();
    } else {
      if (c == '{') ++braces;
      if (c == '}') --braces;
      if (trim(current).empty() && !std::strchr(" \t", c)) first = line;
      current += c;
    }
  }
}

inline void Parser::declare(const std::string& text) {
  std::vector<std::string> words = split(text, ' ');
  if (words[0] == ".reg") {
    int width = bytes_of(words[1].substr(1));
    std::string names = text.substr(text.find(words[1]) + words[1].size());
    for (const std::string& part : split(names, ',')) {
      std::string name = trim(part);
      size_t bracket = name.find('<');
      if (bracket == std::string::npos) {
        scopes_[scope_].registers[name] = add(name, width);
      } else {
        std::string stem = name.substr(0, bracket);
        int count = std::atoi(name.c_str() + bracket + 1);
        for (int i = 0; i < count; ++i) {
          std::string one = stem + std::to_string(i);
          scopes_[scope_].registers[one] = add(one, width);
        }
      }
    }
  } else if (words[0] == ".shared") {
    // .shared .align 16 .b8 name[bytes]
    size_t bracket = text.find('['), name = text.rfind(' ', bracket) + 1;
    int align = words[1] == ".align" ? std::atoi(words[2].c_str()) : 16;
    program.static_shared = (program.static_shared + align - 1) / align * align;
    shared_[text.substr(name, bracket - name)] = program.static_shared;
    int size = bytes_of(split(text.substr(0, name - 1), ' ').back().substr(1));
    program.static_shared += size * std::atoi(text.c_str() + bracket + 1);
  } else if (words[0] != ".pragma") {
    throw Unsupported(text);
  }
}

inline void Parser::statement(const std::string& text, int line) {
  if (text.empty()) return;
  std::string plain;  // with single blanks
  for (char c : text) {
    char blank = c == '\t' || c == '\r' ? ' ' : c;
    if (blank != ' ' || (!plain.empty() && plain.back() != ' ')) plain += blank;
  }
  if (plain[0] == '.') return declare(plain);
  Statement one{line, "", "", {}, plain, scope_};
  std::string rest = plain;
  if (rest[0] == '@') {
    size_t blank = rest.find(' ');
    one.guard = rest.substr(1, blank - 1);
    rest = trim(rest.substr(blank));
  }
  size_t blank = rest.find(' ');
  one.opcode = rest.substr(0, blank);
  std::string operand;
  int depth = 0;
  for (char c : blank == std::string::npos ? "" : rest.substr(blank) + ",") {
    if (c == '{' || c == '[') ++depth;
    if (c == '}' || c == ']') --depth;
    if (c == ',' && depth == 0) {
      if (!trim(operand).empty()) one.operands.push_back(trim(operand));
      operand.clear();
    } else {
      operand += c;
    }
  }
  statements_.push_back(one);
}

inline void Parser::decode(const Statement& statement) {
  Instruction instruction;
  instruction.line = statement.line;
  instruction.text = statement.text;
  scope_ = statement.scope;
  try {
    std::string guard = statement.guard;
    if (!guard.empty()) {
      instruction.guard_is_negated = guard[0] == '!';
      instruction.guard = operand(guard[0] == '!' ? guard.substr(1) : guard, 0);
    }
    ptx::decode(*this, instruction, statement.opcode, statement.operands);
  } catch (const std::exception& error) {
    throw Unsupported("line " + std::to_string(statement.line) + ": `" + statement.text +
                      "`: " + error.what());
  }
  program.code.push_back(instruction);
}

}  // namespace ptx
