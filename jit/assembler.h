// Assembler: the instructions that emission may use, over Xbyak, and nothing else.
//
// Xbyak is one overload away from absolute addresses (`mov(reg, label)`, `putL`, `call(pointer)`);
// this facade has no such overload, so code is position independent by construction. Each wrapper
// ORs the ISA step that its instruction needs into a mask, so a kernel's required ISA is a fact
// about its bytes. Constants live in a pool after the code and are addressed rip-relative.
//
// Single thread each. Tested by emit_test, filetests/code, tests/python/test_isa_escape.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "jit/base/result.h"
#include "jit/base/target.h"

namespace tilewright::jit {

// Physical registers. Ids are the hardware's numbers (rax = 0, rsp = 4, rdi = 7).
struct Gpr {
  int id = -1;
  bool valid() const { return id >= 0; }
  friend bool operator==(const Gpr&, const Gpr&) = default;
};
struct Vec {
  int id = -1;
  int bits = 256;  // 128, 256, 512: the operand size of the instruction
  Vec low() const { return {id, 128}; }
  Vec half() const { return {id, bits / 2}; }
  friend bool operator==(const Vec&, const Vec&) = default;
};
struct Opmask {
  int id = -1;
};
struct Tile {
  int id = -1;
};

constexpr Gpr rax{0}, rcx{1}, rdx{2}, rbx{3}, rsp{4}, rbp{5}, rsi{6}, rdi{7};
constexpr Gpr r8{8}, r9{9}, r10{10}, r11{11}, r12{12}, r13{13}, r14{14}, r15{15};

// [base + index * scale + disp], or an entry of the constant pool (+ disp).
struct Memory {
  Gpr base;
  Gpr index;
  int scale = 1;
  std::int32_t disp = 0;
  int pool_entry = -1;
};

struct Label {
  int id = -1;
};

class Assembler {
 public:
  struct Code {
    std::vector<std::byte> bytes;  // instructions, then padding and the constant pool
    std::size_t code_size = 0;     // where the instructions end
    IsaMask required_isa = 0;
  };
  using Body = std::function<void(Assembler&)>;

  // Runs `body`, which must be repeatable: it is run again with a larger buffer when the code does
  // not fit (64 KiB at first, 16 MiB at most).
  static Result<Code> assemble(const Body& body);
  // The same in the caller's buffer, whose address must not show in the bytes.
  static Result<Code> assemble_in(std::span<std::byte> buffer, const Body& body);

  Assembler(const Assembler&) = delete;
  Assembler& operator=(const Assembler&) = delete;

  // Constants: equal bytes share an entry. 4 and 8-byte entries, or tables of 32 or 64 bytes.
  Memory constant_u32(std::uint32_t value);
  Memory constant_u64(std::uint64_t value);
  Memory table(std::span<const std::byte> bytes);

  Label new_label();
  void bind(Label label);

  // General registers.
  void mov(Gpr d, Gpr a);
  void mov(Gpr d, std::int64_t immediate);
  void mov(Gpr d, const Memory& a);
  void mov(const Memory& d, Gpr a);
  void mov32(const Memory& d, Gpr a);
  void mov16(const Memory& d, Gpr a);
  void mov8(const Memory& d, Gpr a);
  void movsxd(Gpr d, const Memory& a);
  void movzx16(Gpr d, const Memory& a);
  void movzx8(Gpr d, const Memory& a);
  void lea(Gpr d, const Memory& a);
  void add(Gpr d, Gpr a);
  void add(Gpr d, std::int32_t immediate);
  void sub(Gpr d, Gpr a);
  void sub(Gpr d, std::int32_t immediate);
  void neg(Gpr d);
  void dec(Gpr d);
  void dec(const Memory& d);
  void imul(Gpr d, Gpr a);
  void imul(Gpr d, Gpr a, std::int32_t immediate);
  void and_(Gpr d, std::int32_t immediate);
  void xor_(Gpr d, Gpr a);
  void shl(Gpr d, int bits);
  void shl32(Gpr d, int bits);
  void sar(Gpr d, int bits);
  void cmp(Gpr a, Gpr b);
  void test(Gpr a, Gpr b);
  void cmovg(Gpr d, Gpr a);
  void cmovs(Gpr d, const Memory& a);
  void bzhi32(Gpr d, const Memory& a, Gpr index);
  void push(Gpr a);
  void pop(Gpr a);

  // Control.
  void endbr64();
  void jmp(Label label);
  void jz(Label label);
  void jle(Label label);
  void jg(Label label);
  void ret();
  void prefetch(const Memory& a, int level);  // 0: t0, 1: t1, 2: t2, 3: nta

// Vectors of the regular shapes.
#define VECTOR_3(name, isa)       \
  void name(Vec d, Vec a, Vec b); \
  void name(Vec d, Vec a, const Memory& b);
#define VECTOR_2(name, isa) \
  void name(Vec d, Vec a);  \
  void name(Vec d, const Memory& a);
#define VECTOR_2I(name, isa) void name(Vec d, Vec a, int immediate);
#define VECTOR_3I(name, isa) void name(Vec d, Vec a, Vec b, int immediate);
#include "jit/instruction_list.def"
#undef VECTOR_3
#undef VECTOR_2
#undef VECTOR_2I
#undef VECTOR_3I

  // Vectors, other shapes.
  void vzeroupper();
  void vmovups(const Memory& d, Vec a);
  void vmovss(Vec d, const Memory& a);
  void vmovss(const Memory& d, Vec a);
  void vmovd(Vec d, Gpr a);  // the low 32 bits
  void vmovd(const Memory& d, Vec a);
  void vpbroadcastd(Vec d, Gpr a);  // avx512
  void vbroadcasti128(Vec d, const Memory& a);
  void vbroadcasti32x4(Vec d, const Memory& a);  // avx512
  void vcvtsi2ss(Vec d, Vec upper, Gpr a);       // from 64 bits
  void vcvtps2ph(const Memory& d, Vec a);        // round to nearest even
  void vpextrb(const Memory& d, Vec a);          // element 0
  void vpextrw(const Memory& d, Vec a);          // element 0
  void vextracti128(Vec d, Vec a);               // the upper half
  void vmaskmovps(Vec d, Vec mask, const Memory& a);
  void vmaskmovps(const Memory& d, Vec mask, Vec a);
  void vblendvps(Vec d, Vec a, Vec b, Vec mask);  // mask ? b : a

  // AVX-512 masks: `k` writes zero to, or does not touch, the lanes that it leaves out.
  void vmovups(Vec d, Opmask k, const Memory& a);
  void vmovups(const Memory& d, Opmask k, Vec a);
  void vcvtph2ps(Vec d, Opmask k, const Memory& a);
  void vpmovzxwd(Vec d, Opmask k, const Memory& a);
  void vpmovzxbd(Vec d, Opmask k, const Memory& a);
  void vpmovsxbd(Vec d, Opmask k, const Memory& a);
  void vcvtps2ph(const Memory& d, Opmask k, Vec a);
  void vpmovdw(Vec d, Vec a);  // d has half the width of a
  void vpmovdw(const Memory& d, Vec a);
  void vpmovdw(const Memory& d, Opmask k, Vec a);
  void vpmovdb(const Memory& d, Vec a);
  void vpmovdb(const Memory& d, Opmask k, Vec a);
  void vblendmps(Vec d, Opmask k, Vec a, Vec b);  // k ? b : a
  void vcmpps(Opmask d, Vec a, Vec b, int predicate);
  void vpcmpeqd(Opmask d, Vec a, Vec b);
  void vpcmpgtd(Opmask d, Vec a, Vec b);
  void kmovw(Opmask d, Gpr a);
  void kmovw(Opmask d, Opmask a);
  void kmovw(Opmask d, const Memory& a);
  void kmovw(const Memory& d, Opmask a);
  void kandw(Opmask d, Opmask a, Opmask b);
  void korw(Opmask d, Opmask a, Opmask b);
  void kandnw(Opmask d, Opmask a, Opmask b);  // ~a & b

  // Tiles: amx_bf16. The index of a tile's memory operand is the stride of its rows.
  void ldtilecfg(const Memory& a);
  void sttilecfg(const Memory& d);
  void tilezero(Tile d);
  void tileloadd(Tile d, const Memory& a);
  void tilestored(const Memory& d, Tile a);
  void tdpbf16ps(Tile d, Tile a, Tile b);

 private:
  class Generator;

  explicit Assembler(std::span<std::byte> buffer);
  ~Assembler();
  static int attempt(std::span<std::byte> buffer, const Body& body, Code& code);
  Code finish();
  // Notes the step, and avx512 for an operand that only EVEX can encode.
  void require(Isa step, std::initializer_list<Vec> operands);

  std::unique_ptr<Generator> generator_;
  IsaMask required_isa_ = 0;
};

}  // namespace tilewright::jit
