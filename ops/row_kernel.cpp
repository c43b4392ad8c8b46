// The row kernel's builder: primitive steps (row_steps.h) to VIR.
//
// Per row: for each level, one pass over the columns that feeds the reductions of that level; then
// one pass that stores the outputs. A pass computes what it needs from the inputs again: a load and
// some arithmetic cost less than storing an intermediate row and reading it back, and no scratch
// memory is needed. All stores come in the last pass, so an output may be one of the inputs' rows
// themselves. What does not vary along the row is computed between passes, with equal lanes, and
// stays in registers.
//
// Tested by row_kernel_test.
#include "ops/row_kernel.h"

#include <algorithm>
#include <limits>

#include "jit/math.h"
#include "ops/columns.h"
#include "ops/elementwise.h"
#include "ops/row_steps.h"

namespace tilewright::ops {
namespace {

using graph::DataType;
using graph::Op;
using jit::vir::Builder;
using jit::vir::Reg;
using Kind = Step::Kind;

constexpr int kUnroll = 4;          // also the partial accumulators of a reduction: add has a
                                    // latency of 3-4 cycles and two start per cycle
constexpr int kUnrolledSteps = 10;  // longer bodies hide the latency themselves

std::string kernel_name(const RowKernel& spec) {
  constexpr std::size_t kLongest = 60;
  std::string text = "row";
  for (const RowInstruction& instruction : spec.body) {
    if (instruction.op == Op::scalar) continue;
    const std::string_view op = name(instruction.op);
    if (text.size() + op.size() > kLongest) return text + "_more";
    text.append("_").append(op);
  }
  return text;
}

bool is_transcendental(Op op) {
  constexpr std::array known{Op::exp,  Op::expm1, Op::log,     Op::log1p, Op::sin, Op::cos,
                             Op::tanh, Op::erf,   Op::sigmoid, Op::silu,  Op::gelu};
  return std::ranges::find(known, op) != known.end();
}

class RowBuilder {
 public:
  explicit RowBuilder(const RowKernel& spec)
      : spec_(spec),
        expansion_(expand(spec)),
        steps_(expansion_.steps),
        b_(kernel_name(spec), spec.lanes, RowArgs::count(spec)) {}

  jit::vir::Function build() && {
    const int operands = static_cast<int>(spec_.inputs.size() + spec_.outputs.size());
    for (int i = 0; i < operands; ++i) pointers_.push_back(b_.arg(RowArgs::pointer(i)));
    Reg rows = b_.arg(RowArgs::rows);
    b_.loop(rows, [&] {
      row();
      for (int i = 0; i < operands; ++i) {
        b_.add_to(pointers_[static_cast<std::size_t>(i)], b_.arg(RowArgs::row_stride(i)));
      }
    });
    return std::move(b_).finish();
  }

 private:
  // Registers of steps, by step; one such table per row and one per copy of a pass's body.
  using Values = std::vector<Reg>;

  const Step& step(int id) const { return steps_[static_cast<std::size_t>(id)]; }
  Reg& row_value(int id) { return row_values_[static_cast<std::size_t>(id)]; }

  void row() {
    row_values_.assign(steps_.size(), {});
    const std::vector<int> needed = needed_reductions();
    for (int level = 0; level <= highest_level(needed); ++level) {
      std::vector<int> reductions;
      for (int id : needed) {
        if (step(id).level == level + 1) reductions.push_back(id);
      }
      if (!reductions.empty()) reduce(reductions);
    }
    store_columns();
    store_row_results();
  }

  std::vector<int> needed_reductions() const {
    std::vector<bool> needed(steps_.size(), false);
    for (int output : expansion_.outputs) needed[static_cast<std::size_t>(output)] = true;
    std::vector<int> reductions;
    for (int id = static_cast<int>(steps_.size()) - 1; id >= 0; --id) {
      if (!needed[static_cast<std::size_t>(id)] || step(id).is_input()) continue;
      if (step(id).is_reduction()) reductions.push_back(id);
      for (int i = 0; i < step(id).operand_count(); ++i) {
        needed[static_cast<std::size_t>(step(id).operands[static_cast<std::size_t>(i)])] = true;
      }
    }
    std::reverse(reductions.begin(), reductions.end());
    return reductions;
  }

  int highest_level(const std::vector<int>& reductions) const {
    int highest = 0;
    for (int id : reductions) highest = std::max(highest, step(id).level - 1);
    return highest;
  }

  // --- what a pass needs

  struct Pass {
    std::vector<int> varying;  // steps computed per vector
    bool masked_tail = true;
    int unroll = kUnroll;
  };

  // Also computes the row values that the pass reads: after it, the column loop may begin.
  Pass prepare(const std::vector<int>& roots) {
    Pass pass;
    std::vector<bool> seen(steps_.size(), false);
    for (int root : roots) visit(root, seen, pass);
    int cost = 0;
    for (int id : pass.varying) {
      const Step& s = step(id);
      if (s.is_input()) {
        pass.masked_tail &= has_masked_moves(s.dtype, b_.lanes());
      } else {
        cost += is_transcendental(s.op) ? kUnrolledSteps + 1 : 1;
      }
    }
    if (cost > kUnrolledSteps) pass.unroll = 1;
    return pass;
  }

  void visit(int id, std::vector<bool>& seen, Pass& pass) {
    if (seen[static_cast<std::size_t>(id)]) return;
    seen[static_cast<std::size_t>(id)] = true;
    const Step& s = step(id);
    if (!s.varies) {
      if (s.kind != Kind::literal) compute_row_value(id);
      return;
    }
    if (s.kind == Kind::elementwise) {
      for (int i = 0; i < s.operand_count(); ++i) {
        visit(s.operands[static_cast<std::size_t>(i)], seen, pass);
      }
    }
    pass.varying.push_back(id);
  }

  void compute_row_value(int id) {
    const Step& s = step(id);
    if (row_value(id).valid() || s.kind == Kind::literal) return;
    if (s.is_input()) {
      row_value(id) = load_row_input(s);
    } else if (s.kind == Kind::column_count) {
      row_value(id) = spec_.columns >= 0 ? b_.splat(static_cast<float>(spec_.columns))
                                         : b_.splat_converted(b_.arg(RowArgs::columns));
    } else {
      for (int i = 0; i < s.operand_count(); ++i) {
        compute_row_value(s.operands[static_cast<std::size_t>(i)]);
      }
      row_value(id) = emit_step(s, row_values_);
    }
  }

  Reg load_row_input(const Step& s) {
    Reg base = pointers_[static_cast<std::size_t>(s.operands[0])];
    if (s.kind != Kind::input) return load_broadcast_half(b_, base, s.kind == Kind::high_half);
    if (s.dtype == DataType::i64) {
      return b_.splat_converted(b_.load_gpr(jit::vir::Element::i64, b_.at(base)));
    }
    Reg value = load_broadcast(b_, s.dtype, base);
    return s.form == Form::mask ? change_form(b_, value, Form::integer, Form::mask) : value;
  }

  // --- one step

  // `values` holds the operands that are not literals.
  Reg operand(int id, Form form, const Values& values) {
    const Step& s = step(id);
    if (s.kind != Kind::literal) {
      return change_form(b_, values[static_cast<std::size_t>(id)], s.form, form);
    }
    if (form == Form::real) return b_.splat(static_cast<float>(s.value));
    const auto integer = static_cast<std::int32_t>(form == Form::mask ? s.value != 0 : s.value);
    Reg value = b_.splat_bits(static_cast<std::uint32_t>(integer));
    return change_form(b_, value, Form::integer, form);
  }

  Reg emit_step(const Step& s, const Values& values) {
    if (s.op == Op::convert) {
      Reg value = operand(s.operands[0], s.form, values);
      return s.form == Form::real ? round_to(b_, s.dtype, value) : value;
    }
    if (s.op == Op::pow) {
      return jit::math::pow(b_, operand(s.operands[0], Form::real, values), s.value);
    }
    std::array<Reg, 3> registers;
    const int count = s.operand_count();
    for (int i = 0; i < count; ++i) {
      const bool condition = s.op == Op::where && i == 0;
      registers[static_cast<std::size_t>(i)] = operand(
          s.operands[static_cast<std::size_t>(i)], condition ? Form::mask : s.operand_form, values);
    }
    return emit_elementwise(b_, s.op, s.operand_form,
                            std::span(registers).first(static_cast<std::size_t>(count)), s.flag);
  }

  Reg load_input(const Step& s, const Block& block) {
    Reg base = pointers_[static_cast<std::size_t>(s.operands[0])];
    if (s.kind == Kind::input) return load(b_, s.dtype, base, block);
    return load_half(b_, base, block, s.kind == Kind::high_half);
  }

  // All varying steps of a pass for one block, in order; the result also has the row values.
  Values compute(const Pass& pass, const Block& block) {
    Values values = row_values_;
    for (int id : pass.varying) {
      const Step& s = step(id);
      Reg& value = values[static_cast<std::size_t>(id)];
      if (s.is_input()) {
        value = load_input(s, block);
        if (s.form == Form::mask) value = change_form(b_, value, Form::integer, Form::mask);
      } else {
        value = emit_step(s, values);
      }
    }
    return values;
  }

  void columns(const Pass& pass, const BlockBody& body) {
    ColumnCount count{.constant = spec_.columns};
    if (spec_.columns < 0) count = {.constant = -1, .count = b_.arg(RowArgs::columns)};
    for_columns(b_, count, pass.unroll,
                pass.masked_tail ? Block::Part::masked : Block::Part::single, body);
  }

  // --- passes that end in reductions

  static bool is_sum(const Step& s) {
    return s.kind == Kind::sum || s.kind == Kind::sum_of_products;
  }

  Reg neutral(const Step& s) {
    return is_sum(s) ? b_.zero() : b_.splat(-std::numeric_limits<float>::infinity());
  }

  void reduce(const std::vector<int>& reductions) {
    std::vector<int> roots;
    for (int id : reductions) {
      for (int i = 0; i < step(id).operand_count(); ++i) {
        roots.push_back(step(id).operands[static_cast<std::size_t>(i)]);
      }
    }
    Pass pass = prepare(roots);
    if (reductions.size() > 1) pass.unroll = std::min(pass.unroll, kUnroll / 2);

    // Partial accumulators, one per copy of the body, joined in fixed order.
    std::vector<std::vector<Reg>> partials(reductions.size());
    for (std::size_t r = 0; r < reductions.size(); ++r) {
      for (int copy = 0; copy < used_copies(pass); ++copy) {
        partials[r].push_back(b_.copy(neutral(step(reductions[r]))));
      }
    }
    columns(pass, [&](const Block& block) {
      const Values values = compute(pass, block);
      for (std::size_t r = 0; r < reductions.size(); ++r) {
        accumulate(step(reductions[r]), values, block,
                   partials[r][static_cast<std::size_t>(block.copy)]);
      }
    });
    for (std::size_t r = 0; r < reductions.size(); ++r) {
      row_value(reductions[r]) = join(step(reductions[r]), partials[r]);
    }
  }

  int used_copies(const Pass& pass) const {
    if (spec_.columns < 0) return pass.unroll;
    return static_cast<int>(std::clamp<std::int64_t>(spec_.columns / b_.lanes(), 1, pass.unroll));
  }

  void accumulate(const Step& s, const Values& values, const Block& block, Reg partial) {
    Reg value = operand(s.operands[0], Form::real, values);
    const bool all_lanes = block.part == Block::Part::vector;
    if (s.kind == Kind::sum_of_products) {
      Reg factor = operand(s.operands[1], Form::real, values);
      if (all_lanes) return b_.fma(partial, value, factor);
      value = b_.vmul(value, factor);
    }
    if (!all_lanes) value = b_.select(block.mask, value, neutral(s));
    b_.assign(partial, combine(s, value, partial));
  }

  Reg combine(const Step& s, Reg value, Reg accumulated) {
    if (is_sum(s)) return b_.vadd(accumulated, value);
    if (s.kind == Kind::maximum) return maximum(b_, value, accumulated);
    return b_.vmax(value, accumulated);  // the second operand when the first is NaN
  }

  Reg join(const Step& s, const std::vector<Reg>& partials) {
    Reg joined = partials[0];
    for (std::size_t i = 1; i < partials.size(); ++i) joined = combine(s, partials[i], joined);
    for (int distance = b_.lanes() / 2; distance > 0; distance /= 2) {
      joined = combine(s, b_.swap(joined, distance), joined);
    }
    return joined;
  }

  // --- outputs

  Reg& output_pointer(std::size_t output) { return pointers_[spec_.inputs.size() + output]; }

  // As the output's type wants it in a register.
  Reg stored_value(std::size_t output, const Values& values) {
    const DataType type = spec_.output_operands[output].dtype;
    const int id = expansion_.outputs[output];
    if (type != DataType::boolean) return operand(id, form_of(type), values);
    return change_form(b_, operand(id, Form::mask, values), Form::mask, Form::integer);
  }

  void store_columns() {
    std::vector<std::size_t> outputs;
    std::vector<int> roots;
    bool masked_stores = true;
    for (std::size_t i = 0; i < spec_.outputs.size(); ++i) {
      if (spec_.output_operands[i].access != ColumnAccess::contiguous) continue;
      outputs.push_back(i);
      roots.push_back(expansion_.outputs[i]);
      masked_stores &= has_masked_moves(spec_.output_operands[i].dtype, b_.lanes());
    }
    if (outputs.empty()) return;
    Pass pass = prepare(roots);
    pass.masked_tail &= masked_stores;
    columns(pass, [&](const Block& block) {
      const Values values = compute(pass, block);
      for (std::size_t i : outputs) {
        store(b_, spec_.output_operands[i].dtype, output_pointer(i), block,
              stored_value(i, values));
      }
    });
  }

  void store_row_results() {
    for (std::size_t i = 0; i < spec_.outputs.size(); ++i) {
      if (spec_.output_operands[i].access != ColumnAccess::broadcast) continue;
      compute_row_value(expansion_.outputs[i]);
      store(b_, spec_.output_operands[i].dtype, output_pointer(i), {.part = Block::Part::single},
            stored_value(i, row_values_));
    }
  }

  const RowKernel& spec_;
  RowSteps expansion_;
  const std::vector<Step>& steps_;
  Builder b_;
  std::vector<Reg> pointers_;  // inputs, then outputs; they move down the rows
  Values row_values_;
};

}  // namespace

jit::vir::Function build(const RowKernel& spec) { return RowBuilder(spec).build(); }

}  // namespace tilewright::ops
