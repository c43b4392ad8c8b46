// The only file that includes Xbyak. See assembler.h for what is exposed and why.
//
// Tested by emit_test, filetests/code, tests/python/test_isa_escape.py.
#include "jit/assembler.h"

#include <xbyak/xbyak.h>

#include <algorithm>
#include <array>
#include <deque>

#include "fmt/format.h"

namespace tilewright::jit {
namespace {

constexpr std::size_t kFirstBufferSize = 64 << 10;
constexpr std::size_t kLargestBufferSize = 16 << 20;
constexpr std::size_t kCacheLine = 64;
constexpr std::uint8_t kInt3 = 0xCC;

// The operands that Xbyak is given, made once. Its instruction methods take `const Xmm&` or
// `const Ymm&` and look at the kind inside, so the static type Ymm stands for every width.
template <class Register, std::size_t count, class... Rest>
constexpr std::array<Register, count> all_of(Rest... rest) {
  std::array<Register, count> result;
  for (std::size_t i = 0; i < count; ++i) result[i] = Register(static_cast<int>(i), rest...);
  return result;
}
using Xbyak::Operand;
constexpr auto kReg64 = all_of<Xbyak::Reg64, 16>();
constexpr auto kReg32 = all_of<Xbyak::Reg32, 16>();
constexpr auto kXmm = all_of<Xbyak::Ymm, 32>(Operand::XMM, 128);
constexpr auto kYmm = all_of<Xbyak::Ymm, 32>(Operand::YMM, 256);
constexpr auto kZmm = all_of<Xbyak::Ymm, 32>(Operand::ZMM, 512);

const Xbyak::Reg64& reg64(Gpr a) { return kReg64[static_cast<std::size_t>(a.id)]; }
const Xbyak::Reg32& reg32(Gpr a) { return kReg32[static_cast<std::size_t>(a.id)]; }
Xbyak::Opmask opmask(Opmask k) { return Xbyak::Opmask(k.id); }
Xbyak::Tmm tmm(Tile a) { return Xbyak::Tmm(a.id); }
const Xbyak::Ymm& vector(Vec a) {
  return (a.bits == 512 ? kZmm : a.bits == 256 ? kYmm : kXmm)[static_cast<std::size_t>(a.id)];
}

// Table bytes of one kernel's constants; `label` is bound when the pool is written.
struct PoolEntry {
  std::vector<std::byte> bytes;
  Xbyak::Label label;
};

}  // namespace

class Assembler::Generator : public Xbyak::CodeGenerator {
 public:
  explicit Generator(std::span<std::byte> buffer)
      : Xbyak::CodeGenerator(buffer.size(), buffer.data()) {
    setDefaultJmpNEAR(true);  // or a forward jump over more than 127 bytes throws
  }

  // `frame` is the operand's size, where the instruction has more than one.
  Xbyak::Address address(const Memory& a, const Xbyak::AddressFrame& frame) {
    if (a.pool_entry >= 0) {
      return frame[rip + pool[static_cast<std::size_t>(a.pool_entry)].label + a.disp];
    }
    if (a.index.valid()) return frame[reg64(a.base) + reg64(a.index) * a.scale + a.disp];
    return frame[reg64(a.base) + a.disp];
  }
  Xbyak::Address address(const Memory& a) { return address(a, ptr); }
  Xbyak::Label& label(Label a) { return labels[static_cast<std::size_t>(a.id)]; }

  std::deque<PoolEntry> pool;
  std::deque<Xbyak::Label> labels;
};

Assembler::Assembler(std::span<std::byte> buffer)
    : generator_(std::make_unique<Generator>(buffer)) {}
Assembler::~Assembler() = default;

// The one place where Xbyak's exceptions become values: an Xbyak error number, 0 for none.
int Assembler::attempt(std::span<std::byte> buffer, const Body& body, Code& code) {
  try {
    Assembler assembler(buffer);
    body(assembler);
    code = assembler.finish();
    return Xbyak::ERR_NONE;
  } catch (const Xbyak::Error& error) {
    return static_cast<int>(error);
  }
}

Result<Assembler::Code> Assembler::assemble_in(std::span<std::byte> buffer, const Body& body) {
  Code code;
  const int error = attempt(buffer, body, code);
  if (error != Xbyak::ERR_NONE) {
    return Error{fmt::format("assembler: {}", Xbyak::ConvertErrorToString(error))};
  }
  return code;
}

Result<Assembler::Code> Assembler::assemble(const Body& body) {
  Code code;
  for (std::size_t size = kFirstBufferSize; size <= kLargestBufferSize; size *= 4) {
    // Memory of our own: Xbyak's allocator would ask for pages that are writable and executable.
    const auto buffer = std::make_unique_for_overwrite<std::byte[]>(size);
    const int error = attempt({buffer.get(), size}, body, code);
    if (error == Xbyak::ERR_NONE) return code;
    if (error != Xbyak::ERR_CODE_IS_TOO_BIG) {
      return Error{fmt::format("assembler: {}", Xbyak::ConvertErrorToString(error))};
    }
  }
  return Error{fmt::format("assembler: the code does not fit {} bytes", kLargestBufferSize)};
}

// The pool starts on a cache line of its own, tables first so that each is aligned to its size.
Assembler::Code Assembler::finish() {
  Generator& g = *generator_;
  Code code;
  code.code_size = g.getSize();
  code.required_isa = required_isa_;
  std::vector<PoolEntry*> order;
  for (PoolEntry& entry : g.pool) order.push_back(&entry);
  std::stable_sort(order.begin(), order.end(), [](const PoolEntry* a, const PoolEntry* b) {
    return a->bytes.size() > b->bytes.size();
  });
  if (!order.empty()) {
    while (g.getSize() % kCacheLine != 0) g.db(kInt3);
  }
  for (PoolEntry* entry : order) {
    g.L(entry->label);
    for (std::byte value : entry->bytes) g.db(static_cast<int>(value));
  }
  if (g.hasUndefinedLabel()) throw Xbyak::Error(Xbyak::ERR_LABEL_IS_NOT_FOUND);
  const auto* begin = reinterpret_cast<const std::byte*>(g.getCode());
  code.bytes.assign(begin, begin + g.getSize());
  return code;
}

Memory Assembler::constant_u32(std::uint32_t value) {
  return table(std::as_bytes(std::span(&value, 1)));
}

Memory Assembler::constant_u64(std::uint64_t value) {
  return table(std::as_bytes(std::span(&value, 1)));
}

// A linear search: kernels have tens of constants at most.
Memory Assembler::table(std::span<const std::byte> bytes) {
  auto& pool = generator_->pool;
  const auto found = std::find_if(pool.begin(), pool.end(), [&](const PoolEntry& entry) {
    return std::equal(entry.bytes.begin(), entry.bytes.end(), bytes.begin(), bytes.end());
  });
  Memory memory;
  memory.pool_entry = static_cast<int>(found - pool.begin());
  if (found == pool.end()) pool.emplace_back().bytes.assign(bytes.begin(), bytes.end());
  return memory;
}

Label Assembler::new_label() {
  generator_->labels.emplace_back();
  return {static_cast<int>(generator_->labels.size()) - 1};
}

void Assembler::bind(Label label) { generator_->L(generator_->label(label)); }

void Assembler::require(Isa step, std::initializer_list<Vec> operands) {
  required_isa_ |= bit(step);
  for (Vec operand : operands) {
    if (operand.bits == 512 || operand.id >= 16) required_isa_ |= bit(Isa::avx512);
  }
}

// --- general registers: the base instruction set, no ISA step except bzhi (BMI2)

void Assembler::mov(Gpr d, Gpr a) { generator_->mov(reg64(d), reg64(a)); }
void Assembler::mov(Gpr d, std::int64_t immediate) {
  generator_->mov(reg64(d), static_cast<std::uint64_t>(immediate));
}
void Assembler::mov(Gpr d, const Memory& a) { generator_->mov(reg64(d), generator_->address(a)); }
void Assembler::mov(const Memory& d, Gpr a) { generator_->mov(generator_->address(d), reg64(a)); }
void Assembler::mov32(const Memory& d, Gpr a) { generator_->mov(generator_->address(d), reg32(a)); }
void Assembler::mov16(const Memory& d, Gpr a) {
  generator_->mov(generator_->address(d), reg64(a).cvt16());
}
void Assembler::mov8(const Memory& d, Gpr a) {
  generator_->mov(generator_->address(d), reg64(a).cvt8());
}
void Assembler::movsxd(Gpr d, const Memory& a) {
  generator_->movsxd(reg64(d), generator_->address(a, generator_->dword));
}
void Assembler::movzx16(Gpr d, const Memory& a) {
  generator_->movzx(reg32(d), generator_->address(a, generator_->word));
}
void Assembler::movzx8(Gpr d, const Memory& a) {
  generator_->movzx(reg32(d), generator_->address(a, generator_->byte));
}
void Assembler::lea(Gpr d, const Memory& a) { generator_->lea(reg64(d), generator_->address(a)); }
void Assembler::add(Gpr d, Gpr a) { generator_->add(reg64(d), reg64(a)); }
void Assembler::add(Gpr d, std::int32_t immediate) {
  generator_->add(reg64(d), static_cast<std::uint32_t>(immediate));
}
void Assembler::sub(Gpr d, Gpr a) { generator_->sub(reg64(d), reg64(a)); }
void Assembler::sub(Gpr d, std::int32_t immediate) {
  generator_->sub(reg64(d), static_cast<std::uint32_t>(immediate));
}
void Assembler::neg(Gpr d) { generator_->neg(reg64(d)); }
void Assembler::dec(Gpr d) { generator_->dec(reg64(d)); }
void Assembler::dec(const Memory& d) { generator_->dec(generator_->address(d, generator_->qword)); }
void Assembler::imul(Gpr d, Gpr a) { generator_->imul(reg64(d), reg64(a)); }
void Assembler::imul(Gpr d, Gpr a, std::int32_t immediate) {
  generator_->imul(reg64(d), reg64(a), immediate);
}
void Assembler::and_(Gpr d, std::int32_t immediate) {
  generator_->and_(reg64(d), static_cast<std::uint32_t>(immediate));
}
void Assembler::xor_(Gpr d, Gpr a) { generator_->xor_(reg64(d), reg64(a)); }
void Assembler::shl(Gpr d, int bits) { generator_->shl(reg64(d), bits); }
void Assembler::shl32(Gpr d, int bits) { generator_->shl(reg32(d), bits); }
void Assembler::sar(Gpr d, int bits) { generator_->sar(reg64(d), bits); }
void Assembler::cmp(Gpr a, Gpr b) { generator_->cmp(reg64(a), reg64(b)); }
void Assembler::test(Gpr a, Gpr b) { generator_->test(reg64(a), reg64(b)); }
void Assembler::cmovg(Gpr d, Gpr a) { generator_->cmovg(reg64(d), reg64(a)); }
void Assembler::cmovs(Gpr d, const Memory& a) {
  generator_->cmovs(reg64(d), generator_->address(a));
}
void Assembler::bzhi32(Gpr d, const Memory& a, Gpr index) {
  require(Isa::avx2, {});
  generator_->bzhi(reg32(d), generator_->address(a), reg32(index));
}
void Assembler::push(Gpr a) { generator_->push(reg64(a)); }
void Assembler::pop(Gpr a) { generator_->pop(reg64(a)); }

// --- control

void Assembler::endbr64() { generator_->endbr64(); }
void Assembler::jmp(Label label) { generator_->jmp(generator_->label(label)); }
void Assembler::jz(Label label) { generator_->jz(generator_->label(label)); }
void Assembler::jle(Label label) { generator_->jle(generator_->label(label)); }
void Assembler::jg(Label label) { generator_->jg(generator_->label(label)); }
void Assembler::ret() { generator_->ret(); }
void Assembler::prefetch(const Memory& a, int level) {
  const Xbyak::Address address = generator_->address(a);
  switch (level) {
    case 0:
      return generator_->prefetcht0(address);
    case 1:
      return generator_->prefetcht1(address);
    case 2:
      return generator_->prefetcht2(address);
    default:
      return generator_->prefetchnta(address);
  }
}

// --- vectors of the regular shapes

#define VECTOR_3(name, isa)                                         \
  void Assembler::name(Vec d, Vec a, Vec b) {                       \
    require(Isa::isa, {d, a, b});                                   \
    generator_->name(vector(d), vector(a), vector(b));              \
  }                                                                 \
  void Assembler::name(Vec d, Vec a, const Memory& b) {             \
    require(Isa::isa, {d, a});                                      \
    generator_->name(vector(d), vector(a), generator_->address(b)); \
  }
#define VECTOR_2(name, isa)                              \
  void Assembler::name(Vec d, Vec a) {                   \
    require(Isa::isa, {d, a});                           \
    generator_->name(vector(d), vector(a));              \
  }                                                      \
  void Assembler::name(Vec d, const Memory& a) {         \
    require(Isa::isa, {d});                              \
    generator_->name(vector(d), generator_->address(a)); \
  }
#define VECTOR_2I(name, isa)                                                      \
  void Assembler::name(Vec d, Vec a, int immediate) {                             \
    require(Isa::isa, {d, a});                                                    \
    generator_->name(vector(d), vector(a), static_cast<std::uint8_t>(immediate)); \
  }
#define VECTOR_3I(name, isa)                                                                 \
  void Assembler::name(Vec d, Vec a, Vec b, int immediate) {                                 \
    require(Isa::isa, {d, a, b});                                                            \
    generator_->name(vector(d), vector(a), vector(b), static_cast<std::uint8_t>(immediate)); \
  }
#include "jit/instruction_list.def"
#undef VECTOR_3
#undef VECTOR_2
#undef VECTOR_2I
#undef VECTOR_3I

// --- vectors, other shapes

void Assembler::vzeroupper() {
  require(Isa::avx2, {});
  generator_->vzeroupper();
}
void Assembler::vmovups(const Memory& d, Vec a) {
  require(Isa::avx2, {a});
  generator_->vmovups(generator_->address(d), vector(a));
}
void Assembler::vmovss(Vec d, const Memory& a) {
  require(Isa::avx2, {d});
  generator_->vmovss(vector(d), generator_->address(a));
}
void Assembler::vmovss(const Memory& d, Vec a) {
  require(Isa::avx2, {a});
  generator_->vmovss(generator_->address(d), vector(a));
}
void Assembler::vmovd(Vec d, Gpr a) {
  require(Isa::avx2, {d});
  generator_->vmovd(vector(d), reg32(a));
}
void Assembler::vmovd(const Memory& d, Vec a) {
  require(Isa::avx2, {a});
  generator_->vmovd(generator_->address(d), vector(a));
}
void Assembler::vpbroadcastd(Vec d, Gpr a) {
  require(Isa::avx512, {d});
  generator_->vpbroadcastd(vector(d), reg32(a));
}
void Assembler::vbroadcasti128(Vec d, const Memory& a) {
  require(Isa::avx2, {d});
  generator_->vbroadcasti128(Xbyak::Ymm(d.id), generator_->address(a));
}
void Assembler::vbroadcasti32x4(Vec d, const Memory& a) {
  require(Isa::avx512, {d});
  generator_->vbroadcasti32x4(vector(d), generator_->address(a));
}
void Assembler::vcvtsi2ss(Vec d, Vec upper, Gpr a) {
  require(Isa::avx2, {d, upper});
  generator_->vcvtsi2ss(vector(d), vector(upper), reg64(a));
}
void Assembler::vcvtps2ph(const Memory& d, Vec a) {
  require(Isa::avx2, {a});
  generator_->vcvtps2ph(generator_->address(d), vector(a), 0);
}
void Assembler::vpextrb(const Memory& d, Vec a) {
  require(Isa::avx2, {a});
  generator_->vpextrb(generator_->address(d), vector(a), 0);
}
void Assembler::vpextrw(const Memory& d, Vec a) {
  require(Isa::avx2, {a});
  generator_->vpextrw(generator_->address(d), vector(a), 0);
}
void Assembler::vextracti128(Vec d, Vec a) {
  require(Isa::avx2, {d, a});
  generator_->vextracti128(vector(d), vector(a), 1);
}
void Assembler::vmaskmovps(Vec d, Vec mask, const Memory& a) {
  require(Isa::avx2, {d, mask});
  generator_->vmaskmovps(vector(d), vector(mask), generator_->address(a));
}
void Assembler::vmaskmovps(const Memory& d, Vec mask, Vec a) {
  require(Isa::avx2, {mask, a});
  generator_->vmaskmovps(generator_->address(d), vector(mask), vector(a));
}
void Assembler::vblendvps(Vec d, Vec a, Vec b, Vec mask) {
  require(Isa::avx2, {d, a, b, mask});
  generator_->vblendvps(vector(d), vector(a), vector(b), vector(mask));
}

// --- AVX-512 masks

void Assembler::vmovups(Vec d, Opmask k, const Memory& a) {
  require(Isa::avx512, {});
  generator_->vmovups(vector(d) | opmask(k) | generator_->T_z, generator_->address(a));
}
void Assembler::vmovups(const Memory& d, Opmask k, Vec a) {
  require(Isa::avx512, {});
  generator_->vmovups(generator_->address(d) | opmask(k), vector(a));
}
void Assembler::vcvtph2ps(Vec d, Opmask k, const Memory& a) {
  require(Isa::avx512, {});
  generator_->vcvtph2ps(vector(d) | opmask(k) | generator_->T_z, generator_->address(a));
}
void Assembler::vpmovzxwd(Vec d, Opmask k, const Memory& a) {
  require(Isa::avx512, {});
  generator_->vpmovzxwd(vector(d) | opmask(k) | generator_->T_z, generator_->address(a));
}
void Assembler::vpmovzxbd(Vec d, Opmask k, const Memory& a) {
  require(Isa::avx512, {});
  generator_->vpmovzxbd(vector(d) | opmask(k) | generator_->T_z, generator_->address(a));
}
void Assembler::vpmovsxbd(Vec d, Opmask k, const Memory& a) {
  require(Isa::avx512, {});
  generator_->vpmovsxbd(vector(d) | opmask(k) | generator_->T_z, generator_->address(a));
}
void Assembler::vcvtps2ph(const Memory& d, Opmask k, Vec a) {
  require(Isa::avx512, {});
  generator_->vcvtps2ph(generator_->address(d) | opmask(k), vector(a), 0);
}
void Assembler::vpmovdw(Vec d, Vec a) {
  require(Isa::avx512, {});
  generator_->vpmovdw(vector(d), vector(a));
}
void Assembler::vpmovdw(const Memory& d, Vec a) {
  require(Isa::avx512, {});
  generator_->vpmovdw(generator_->address(d), vector(a));
}
void Assembler::vpmovdw(const Memory& d, Opmask k, Vec a) {
  require(Isa::avx512, {});
  generator_->vpmovdw(generator_->address(d) | opmask(k), vector(a));
}
void Assembler::vpmovdb(const Memory& d, Vec a) {
  require(Isa::avx512, {});
  generator_->vpmovdb(generator_->address(d), vector(a));
}
void Assembler::vpmovdb(const Memory& d, Opmask k, Vec a) {
  require(Isa::avx512, {});
  generator_->vpmovdb(generator_->address(d) | opmask(k), vector(a));
}
void Assembler::vblendmps(Vec d, Opmask k, Vec a, Vec b) {
  require(Isa::avx512, {});
  generator_->vblendmps(vector(d) | opmask(k), vector(a), vector(b));
}
void Assembler::vcmpps(Opmask d, Vec a, Vec b, int predicate) {
  require(Isa::avx512, {});
  generator_->vcmpps(opmask(d), vector(a), vector(b), static_cast<std::uint8_t>(predicate));
}
void Assembler::vpcmpeqd(Opmask d, Vec a, Vec b) {
  require(Isa::avx512, {});
  generator_->vpcmpeqd(opmask(d), vector(a), vector(b));
}
void Assembler::vpcmpgtd(Opmask d, Vec a, Vec b) {
  require(Isa::avx512, {});
  generator_->vpcmpgtd(opmask(d), vector(a), vector(b));
}
void Assembler::kmovw(Opmask d, Gpr a) {
  require(Isa::avx512, {});
  generator_->kmovw(opmask(d), reg32(a));
}
void Assembler::kmovw(Opmask d, Opmask a) {
  require(Isa::avx512, {});
  generator_->kmovw(opmask(d), opmask(a));
}
void Assembler::kmovw(Opmask d, const Memory& a) {
  require(Isa::avx512, {});
  generator_->kmovw(opmask(d), generator_->address(a));
}
void Assembler::kmovw(const Memory& d, Opmask a) {
  require(Isa::avx512, {});
  generator_->kmovw(generator_->address(d), opmask(a));
}
void Assembler::kandw(Opmask d, Opmask a, Opmask b) {
  require(Isa::avx512, {});
  generator_->kandw(opmask(d), opmask(a), opmask(b));
}
void Assembler::korw(Opmask d, Opmask a, Opmask b) {
  require(Isa::avx512, {});
  generator_->korw(opmask(d), opmask(a), opmask(b));
}
void Assembler::kandnw(Opmask d, Opmask a, Opmask b) {
  require(Isa::avx512, {});
  generator_->kandnw(opmask(d), opmask(a), opmask(b));
}

// --- tiles

void Assembler::ldtilecfg(const Memory& a) {
  require(Isa::amx_bf16, {});
  generator_->ldtilecfg(generator_->address(a));
}
void Assembler::sttilecfg(const Memory& d) {
  require(Isa::amx_bf16, {});
  generator_->sttilecfg(generator_->address(d));
}
void Assembler::tilezero(Tile d) {
  require(Isa::amx_bf16, {});
  generator_->tilezero(tmm(d));
}
void Assembler::tileloadd(Tile d, const Memory& a) {
  require(Isa::amx_bf16, {});
  generator_->tileloadd(tmm(d), generator_->address(a));
}
void Assembler::tilestored(const Memory& d, Tile a) {
  require(Isa::amx_bf16, {});
  generator_->tilestored(generator_->address(d), tmm(a));
}
void Assembler::tdpbf16ps(Tile d, Tile a, Tile b) {
  require(Isa::amx_bf16, {});
  generator_->tdpbf16ps(tmm(d), tmm(a), tmm(b));
}

}  // namespace tilewright::jit
