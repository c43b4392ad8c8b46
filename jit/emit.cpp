// From VIR to bytes: checks, allocation, prologue and epilogue, and the loading and storing of
// spilled operands around each op. What an op becomes is in emit_*.cpp, one function per op.
//
// Tested by emit_test, filetests/code.
#include "jit/emit.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <numeric>

#include "jit/assembler.h"
#include "jit/emission.h"
#include "jit/vir/linear_scan.h"
#include "jit/vir/signature.h"

namespace tilewright::jit {
namespace emission {
namespace {

using vir::Home;
using vir::Instruction;
using vir::Kind;
using vir::Op;
using vir::Reg;

using OpEmitter = void (*)(Site&);
constexpr OpEmitter kEmitters[] = {
#define VIR_OP(name, signature) &name,
#include "jit/vir/op_list.def"
#undef VIR_OP
};

// In order of preference: the arguments arrive in rdi; the registers that the ABI makes us save
// come last. rsp is the stack's, rax is kScratch.
constexpr std::array kGprs = {rdi, rsi, rdx, rcx, r8, r9, r10, r11, rbx, rbp, r12, r13, r14, r15};
constexpr std::array kCalleeSaved = {rbx, rbp, r12, r13, r14, r15};

std::vector<int> numbers(int first, int count) {
  std::vector<int> result(static_cast<std::size_t>(count));
  std::iota(result.begin(), result.end(), first);
  return result;
}

vir::RegisterFile register_file(int lanes) {
  vir::RegisterFile file;
  for (Gpr gpr : kGprs) file.gpr.push_back(gpr.id);
  file.vec = numbers(0, lanes == 16 ? 32 : 16);
  if (lanes == 16) file.mask = numbers(1, 7);  // k0 means "no mask" as an operand
  file.tile = numbers(0, kTiles);
  return file;
}

vir::Allocation allocate_registers(const vir::Function& function) {
  std::vector<std::uint8_t> temporaries;
  for (const Instruction& instruction : function.code) {
    temporaries.push_back(static_cast<std::uint8_t>(temporary_count(instruction, function.lanes)));
  }
  return vir::allocate(function, register_file(function.lanes), temporaries);
}

Status check_target(const vir::Function& function, const Target& target) {
  const auto missing = [&](std::string_view what, Isa step) -> Status {
    return Error{fmt::format("emit {}: {} needs {}, the target has {}", function.name, what,
                             isa_mask_name(bit(step)), isa_mask_name(target.isa))};
  };
  if (!target.has(Isa::avx2)) return missing("all code", Isa::avx2);
  if (function.lanes == 16 && !target.has(Isa::avx512)) return missing("lanes=16", Isa::avx512);
  const auto uses = [&](Op op) {
    return std::any_of(function.code.begin(), function.code.end(),
                       [op](const Instruction& in) { return in.op == op; });
  };
  if (function.tile_count > 0 && !target.has(Isa::amx_bf16)) {
    return missing("tiles", Isa::amx_bf16);
  }
  for (auto [op, step] :
       {std::pair(Op::vdpbytes, Isa::avx512_vnni), std::pair(Op::vdpbf16, Isa::avx512_bf16)}) {
    if (!target.has(step) && uses(op)) return missing(vir::op_name(op), step);
  }
  return {};
}

// For each if: whether it has an else.
std::vector<bool> find_elses(const vir::Function& function) {
  std::vector<bool> result(function.code.size(), false);
  std::vector<std::size_t> open;
  for (std::size_t i = 0; i < function.code.size(); ++i) {
    const Op op = function.code[i].op;
    if (op == Op::if_) open.push_back(i);
    if (op == Op::else_) result[open.back()] = true;
    if (op == Op::endif) open.pop_back();
  }
  return result;
}

// Writes one function with an allocation that is already made.
class FunctionWriter {
 public:
  FunctionWriter(Assembler& as, const vir::Function& function, const vir::Allocation& allocation)
      : as_(as),
        function_(function),
        allocation_(allocation),
        has_else_(find_elses(function)),
        masks_in_vectors_(function.lanes == 8) {
    for (Gpr gpr : kCalleeSaved) {
      const auto& used = allocation.used_gprs;
      if (std::binary_search(used.begin(), used.end(), gpr.id)) saved_.push_back(gpr);
    }
  }

  void write() {
    prologue();
    for (std::size_t i = 0; i < function_.code.size(); ++i) write_instruction(i);
    epilogue();
  }

 private:
  struct Structure {
    Label begin, middle, end;
    Home counter;
  };
  // How many scratch registers of each class the current instruction has taken.
  struct Taken {
    std::size_t gpr = 0, vec = 0, mask = 0;
  };

  void prologue() {
    as_.endbr64();
    for (Gpr gpr : saved_) as_.push(gpr);
    if (allocation_.frame_bytes > 0) as_.sub(rsp, allocation_.frame_bytes);
    if (allocation_.args.spilled()) as_.mov(slot(allocation_.args), rdi);
  }

  void epilogue() {
    // Dirty upper halves would slow down every SSE instruction of the caller.
    if (function_.vec_count + function_.mask_count > 0) as_.vzeroupper();
    if (allocation_.frame_bytes > 0) as_.add(rsp, allocation_.frame_bytes);
    for (auto gpr = saved_.rbegin(); gpr != saved_.rend(); ++gpr) as_.pop(*gpr);
    as_.ret();
  }

  void write_instruction(std::size_t index) {
    const Instruction& in = function_.code[index];
    const vir::Signature& signature = vir::signature(in.op);
    Site site{.as = as_, .instruction = in, .lanes = function_.lanes};
    taken_ = {};
    if (signature.has_address) site.memory = address(in.address);
    if (in.op == Op::garg) site.args = {load(vir::kArgsPointer, site.memory)};
    for (std::size_t k = 0; k < static_cast<std::size_t>(signature.source_count); ++k) {
      site.source[k] = load(in.src[k], site.memory);
    }
    if (signature.definition != 0) site.destination = destination(in.dst);
    for (std::size_t t = 0; t < vir::kTemporaries; ++t) {
      site.temporary[t] = allocation_.temporaries[index * vir::kTemporaries + t];
    }
    enter_structure(index, site);
    kEmitters[static_cast<std::size_t>(in.op)](site);
    if (in.op == Op::endloop || in.op == Op::endif) open_.pop_back();

    if (signature.definition != 0) store(in.dst, site.destination);
    if (signature.source[0] == 'W') store(in.src[0], site.source[0]);
  }

  void enter_structure(std::size_t index, Site& site) {
    const Instruction& in = function_.code[index];
    if (in.op == Op::loop) {
      open_.push_back({as_.new_label(), {}, as_.new_label(), allocation_.home(in.src[0])});
    } else if (in.op == Op::if_) {
      open_.push_back({{}, as_.new_label(), as_.new_label(), {}});
      site.has_else = has_else_[index];
    } else if (in.op != Op::endloop && in.op != Op::else_ && in.op != Op::endif) {
      return;
    }
    site.begin = open_.back().begin;
    site.middle = open_.back().middle;
    site.end = open_.back().end;
    site.counter = open_.back().counter;
  }

  static Memory slot(const Home& home) { return Memory{rsp, {}, 1, home.slot}; }
  bool in_vector(Kind kind) const {
    return kind == Kind::vec || (kind == Kind::mask && masks_in_vectors_);
  }
  Vec vector(int reg) const { return {reg, 32 * function_.lanes}; }

  int take(const std::vector<int>& scratch, std::size_t& taken) { return scratch[taken++]; }

  int take_scratch(Kind kind) {
    if (kind == Kind::gpr) return take(allocation_.gpr_scratch, taken_.gpr);
    if (in_vector(kind)) return take(allocation_.vec_scratch, taken_.vec);
    return take(allocation_.mask_scratch, taken_.mask);
  }

  // The register that holds `reg` while this instruction runs; loads it when it is spilled. May
  // simplify `memory`, the instruction's address, to make room.
  int load(Reg reg, Memory& memory) {
    const Home& home = allocation_.home(reg);
    if (!home.spilled()) return home.reg;
    if (reg.kind == Kind::gpr && taken_.gpr == vir::kGprScratch) {
      // Base and index took both: their sum needs one.
      taken_.gpr = 0;
      const Gpr sum{take_scratch(Kind::gpr)};
      as_.lea(sum, memory);
      memory = Memory{sum, {}, 1, 0};
    }
    const int scratch = take_scratch(reg.kind);
    if (reg.kind == Kind::gpr) {
      as_.mov(Gpr{scratch}, slot(home));
    } else if (in_vector(reg.kind)) {
      as_.vmovups(vector(scratch), slot(home));
    } else {
      as_.kmovw(Opmask{scratch}, slot(home));
    }
    return scratch;
  }

  // A spilled result may use the scratch register of a source: sources and results alias anyway.
  int destination(Reg reg) {
    const Home& home = allocation_.home(reg);
    if (!home.spilled()) return home.reg;
    taken_ = {};
    return take_scratch(reg.kind);
  }

  void store(Reg reg, int from) {
    const Home& home = allocation_.home(reg);
    if (!home.spilled()) return;
    if (reg.kind == Kind::gpr) {
      as_.mov(slot(home), Gpr{from});
    } else if (in_vector(reg.kind)) {
      as_.vmovups(slot(home), vector(from));
    } else {
      as_.kmovw(slot(home), Opmask{from});
    }
  }

  Memory address(const vir::Address& address) {
    Memory memory;
    memory.base = {load(address.base, memory)};
    if (address.index.valid()) {
      memory.index = {load(address.index, memory)};
      memory.scale = address.scale;
    }
    memory.disp = address.disp;
    return memory;
  }

  Assembler& as_;
  const vir::Function& function_;
  const vir::Allocation& allocation_;
  std::vector<bool> has_else_;
  bool masks_in_vectors_;
  std::vector<Gpr> saved_;
  std::vector<Structure> open_;
  Taken taken_;
};

template <class Assemble>
Result<CodeObject> emit_with(const vir::Function& function, const Target& target,
                             Assemble&& assemble) {
  if (Status status = vir::verify(function); !status.ok()) return status.error();
  if (Status status = check_target(function, target); !status.ok()) return status.error();
  const vir::Allocation allocation = allocate_registers(function);
  if (allocation.tile_spills > 0) {
    return Error{fmt::format("emit {}: it needs more than {} tiles", function.name, kTiles)};
  }
  Result<Assembler::Code> code =
      assemble([&](Assembler& as) { FunctionWriter(as, function, allocation).write(); });
  if (!code.ok()) return Error{fmt::format("emit {}: {}", function.name, code.error().message)};
  return CodeObject{.name = function.name,
                    .bytes = std::move(code->bytes),
                    .code_size = code->code_size,
                    .required_isa = code->required_isa,
                    .spills = allocation.spills,
                    .inner_loop_spills = allocation.inner_loop_spills};
}

}  // namespace

Result<CodeObject> emit_in(const vir::Function& function, const Target& target,
                           std::span<std::byte> buffer) {
  return emit_with(function, target, [&](const Assembler::Body& body) {
    return Assembler::assemble_in(buffer, body);
  });
}

}  // namespace emission

Result<CodeObject> emit(const vir::Function& function, const Target& target) {
  return emission::emit_with(function, target,
                             [](const Assembler::Body& body) { return Assembler::assemble(body); });
}

}  // namespace tilewright::jit
