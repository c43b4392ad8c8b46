// Builder: writes a VIR function, one method per instruction, with values where C++ has values.
//
//   Builder b("axpy", 8, 3);
//   Reg x = b.arg(0), y = b.arg(1), n = b.arg(2);
//   b.loop(n, [&] {
//     Reg v = b.load(Element::f32, b.at(x));
//     ...
//   });
//   Function f = std::move(b).finish();
//
// Registers are mutable: `Reg v = b.zero(); b.fma(v, a, c);` updates v; `b.assign(g, h)` moves.
// Nothing here knows an ISA beyond the number of lanes and `has_scalef` (AVX-512).
//
// Tested by vir_test.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <utility>

#include "jit/vir/vir.h"

namespace tilewright::jit::vir {

class Builder {
 public:
  Builder(std::string name, int lanes, int arg_count);

  int lanes() const { return function_.lanes; }
  int vector_bytes() const { return 4 * lanes(); }
  bool has_scalef() const { return lanes() == 16; }

  // Addresses.
  Address at(Reg base, std::int64_t disp = 0) const;
  Address at(Reg base, Reg index, int scale, std::int64_t disp = 0) const;

  // General registers.
  Reg constant(std::int64_t value);
  Reg arg(int slot);
  Reg copy(Reg source);                      // a new register, gpr or vec
  void assign(Reg destination, Reg source);  // gmov / vmov into an existing register
  Reg add(Reg a, Reg b);
  Reg add(Reg a, std::int64_t b);
  void add_to(Reg a, Reg b);  // a += b
  void add_to(Reg a, std::int64_t b);
  Reg sub(Reg a, Reg b);
  Reg mul(Reg a, Reg b);
  Reg mul(Reg a, std::int64_t b);
  Reg shift_left(Reg a, int bits);
  Reg shift_right(Reg a, int bits);
  Reg bit_and(Reg a, std::int64_t mask);
  Reg min(Reg a, Reg b);
  Reg max(Reg a, Reg b);
  Reg lea(Address address);
  Reg load_gpr(Element element, Address address);
  void store_gpr(Element element, Address address, Reg value);

  // Structure. The counter is consumed: pass a copy if its value is needed later.
  template <class Body>
  void loop(Reg counter, Body&& body) {
    begin_loop(counter);
    std::forward<Body>(body)();
    end_loop();
  }
  template <class Then>
  void if_nonzero(Reg condition, Then&& then) {
    begin_if(condition);
    std::forward<Then>(then)();
    end_if();
  }
  template <class Then, class Else>
  void if_nonzero(Reg condition, Then&& then, Else&& otherwise) {
    begin_if(condition);
    std::forward<Then>(then)();
    begin_else();
    std::forward<Else>(otherwise)();
    end_if();
  }

  // Vectors. Each returns a new register unless the name says otherwise.
  Reg zero();
  Reg splat(float value) { return splat_bits(std::bit_cast<std::uint32_t>(value)); }
  Reg splat_bits(std::uint32_t bits);
  Reg splat(Reg gpr);
  Reg splat_converted(Reg gpr);  // (float) of a 64-bit integer
  Reg iota();
  Reg load(Element element, Address address);
  Reg load_masked(Element element, Address address, Reg mask);
  Reg load_one(Element element, Address address);
  Reg broadcast(Element element, Address address);
  Reg broadcast_16_bytes(Address address);
  void store(Element element, Address address, Reg value);
  void store_masked(Element element, Address address, Reg value, Reg mask);
  void store_one(Element element, Address address, Reg value);

  Reg vadd(Reg a, Reg b);
  Reg vsub(Reg a, Reg b);
  Reg vmul(Reg a, Reg b);
  Reg vdiv(Reg a, Reg b);
  Reg vmax(Reg a, Reg b);
  Reg vmin(Reg a, Reg b);
  Reg vsqrt(Reg a);
  Reg vround(Reg a);
  void fma(Reg accumulator, Reg a, Reg b);   // accumulator += a * b
  void fnma(Reg accumulator, Reg a, Reg b);  // accumulator -= a * b
  void fms(Reg accumulator, Reg a, Reg b);   // accumulator = a * b - accumulator
  void fma_load(Reg accumulator, Reg a, Address f32_vector);
  Reg scalef(Reg a, Reg b);
  Reg to_i32(Reg a);
  Reg to_f32(Reg a);
  Reg low_f16_to_f32(Reg a);
  void dot_bf16(Reg accumulator, Reg a, Reg b);
  void dot_bytes(Reg accumulator, Reg a_unsigned, Reg b_signed);

  Reg vand(Reg a, Reg b);
  Reg vor(Reg a, Reg b);
  Reg vxor(Reg a, Reg b);
  Reg vandn(Reg a, Reg b);  // ~a & b
  Reg iadd(Reg a, Reg b);
  Reg isub(Reg a, Reg b);
  Reg imul(Reg a, Reg b);
  Reg vshift_left(Reg a, int bits);
  Reg vshift_right(Reg a, int bits);  // logical
  Reg vshift_right_signed(Reg a, int bits);
  Reg swap(Reg a, int distance);
  // vunzip_lanes and vunzip_runs: of a, then of b.
  Reg even_lanes(Reg a, Reg b);
  Reg odd_lanes(Reg a, Reg b);
  Reg even_runs(Reg a, Reg b);
  Reg odd_runs(Reg a, Reg b);

  // Bytes, in every run of 16 alike.
  Reg lookup_bytes(Reg table, Reg index);
  Reg interleave_low(Reg a, Reg b);
  Reg interleave_high(Reg a, Reg b);
  Reg interleave_halves_low(Reg a, Reg b);
  Reg interleave_halves_high(Reg a, Reg b);

  Reg tail_mask(Reg count);
  Reg less(Reg a, Reg b);
  Reg less_equal(Reg a, Reg b);
  Reg equal(Reg a, Reg b);
  Reg not_equal(Reg a, Reg b);  // true on NaN: not_equal(x, x) is isnan
  Reg iequal(Reg a, Reg b);
  Reg igreater(Reg a, Reg b);
  Reg mask_and(Reg a, Reg b);
  Reg mask_or(Reg a, Reg b);
  Reg mask_andn(Reg a, Reg b);
  Reg select(Reg mask, Reg a, Reg b);  // mask ? a : b

  // Tiles: between configure_tiles and restore_tiles, with what save_tiles wrote. The address has
  // no index.
  void save_tiles(Address to);
  void configure_tiles();
  void restore_tiles(Address from);
  Reg tile_zero();
  Reg tile_load(Address address, Reg row_stride);
  void tile_load_into(Reg tile, Address address, Reg row_stride);
  void tile_store(Address address, Reg row_stride, Reg tile);
  void tile_dot_bf16(Reg accumulator, Reg a, Reg b);

  void prefetch(Address address, int level = 0);

  // Composites made of the above.
  Reg reduce_add(Reg a);  // the sum of all lanes in every lane (butterfly: fixed order)
  Reg reduce_max(Reg a);
  Reg round_to_bf16_bits(
      Reg f32);  // low 16 bits of each lane: RNE, NaN stays NaN (quiet); store as u16

  Function finish() &&;

 private:
  void begin_loop(Reg counter);
  void end_loop();
  void begin_if(Reg condition);
  void begin_else();
  void end_if();

  Reg fresh(Kind kind);
  Instruction& append(Op op);
  Reg unary(Op op, Kind kind, Reg a);
  Reg binary(Op op, Kind kind, Reg a, Reg b);
  Reg unzip(Op op, Reg a, Reg b, int odd);
  Reg with_immediate(Op op, Kind kind, Reg a, std::int64_t immediate);
  Reg with_address(Op op, Kind kind, Element element, Address address);
  void to_memory(Op op, Element element, Address address, Reg value);
  void accumulate(Op op, Reg accumulator, Reg a, Reg b);

  Function function_;
};

}  // namespace tilewright::jit::vir
