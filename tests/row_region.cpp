// Row regions for tests: memory, the check, and the generator of random regions.
#include "row_region.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "error_bound.h"
#include "ops/scalar_type.h"

namespace tilewright {
namespace {

using graph::DataType;
using graph::Op;
using ops::ColumnAccess;
using ops::RowArgs;
using ops::RowInstruction;
using ops::RowKernel;
using ops::RowOperand;

int pick(Random& random, int count) {
  return std::uniform_int_distribution<int>(0, count - 1)(random);
}

template <class T>
const T& pick(Random& random, const std::vector<T>& from) {
  return from[static_cast<std::size_t>(pick(random, static_cast<int>(from.size())))];
}

std::unique_ptr<GuardedRows> rows_for(const RowOperand& operand, const RegionData& data,
                                      Random& random) {
  const std::int64_t size = size_in_bytes(operand.dtype);
  const std::int64_t count = operand.access == ColumnAccess::contiguous ? data.columns : 1;
  const auto flush = pick(random, 2) == 0 ? GuardedRows::Flush::start : GuardedRows::Flush::end;
  return std::make_unique<GuardedRows>(data.rows, count * size, pick(random, 3) * size, flush);
}

void fill_rows(GuardedRows& to, const RowOperand& operand, const RegionData& data, Random& random,
               const Fill& fill) {
  const std::int64_t size = size_in_bytes(operand.dtype);
  const std::int64_t count = operand.access == ColumnAccess::contiguous ? data.columns : 1;
  for (std::int64_t r = 0; r < data.rows; ++r) {
    for (std::int64_t i = 0; i < count; ++i) {
      double value = fill(random);
      if (!is_float(operand.dtype)) value = std::trunc(4 * value);
      if (operand.dtype == DataType::boolean) value = value > 0;
      ops::write_scalar(operand.dtype, to.row(r) + i * size, value);
    }
  }
}

bool within(double got, const Bounded& expected, double allowed) {
  if (std::isnan(got)) return false;
  return std::abs(got - expected.value) <= allowed;
}

}  // namespace

std::string run_engine(Engine engine, const jit::vir::Function& function,
                       const std::int64_t* args) {
  if (engine == Engine::interpreter) {
    jit::vir::interpret(function, args);
    return "";
  }
  const auto code = jit::emit(function, target_with_lanes(function.lanes));
  if (!code) return code.error().message;
  jit::CodeMemory memory;
  const std::array<std::span<const std::byte>, 1> bytes{code->bytes};
  const auto entries = memory.publish(bytes);
  if (!entries) return entries.error().message;
  return testing::call_checked(entries->front(), args);
}

double standard_normal(Random& random) { return std::normal_distribution<double>()(random); }

RegionData::RegionData(RowKernel kernel, std::int64_t row_count, std::int64_t column_count,
                       Random& random, const Fill& fill)
    : spec(std::move(kernel)), rows(row_count), columns(column_count) {
  args.assign(static_cast<std::size_t>(RowArgs::count(spec)), 0);
  args[RowArgs::rows] = rows;
  args[RowArgs::columns] = columns;
  for (const RowOperand& input : spec.inputs) {
    operands.push_back(rows_for(input, *this, random));
    fill_rows(*operands.back(), input, *this, random, fill);
  }
  for (const RowOperand& output : spec.output_operands) {
    operands.push_back(rows_for(output, *this, random));
    references.push_back(rows_for(output, *this, random));
  }
  for (std::size_t i = 0; i < operands.size(); ++i) {
    const int operand = static_cast<int>(i);
    args[static_cast<std::size_t>(RowArgs::pointer(operand))] = operands[i]->address();
    args[static_cast<std::size_t>(RowArgs::row_stride(operand))] = operands[i]->stride();
  }
}

std::vector<std::int64_t> RegionData::args_of_reference() const {
  std::vector<std::int64_t> result = args;
  for (std::size_t i = 0; i < references.size(); ++i) {
    const int operand = static_cast<int>(spec.inputs.size() + i);
    result[static_cast<std::size_t>(RowArgs::pointer(operand))] = references[i]->address();
    result[static_cast<std::size_t>(RowArgs::row_stride(operand))] = references[i]->stride();
  }
  return result;
}

std::string check_region(RegionData& data, Engine engine, std::int64_t* checked) {
  if (Status status = supported(data.spec); !status) return status.error().message;
  const jit::vir::Function function = build(data.spec);
  if (Status status = jit::vir::verify(function); !status) {
    return status.error().message + "\n" + jit::vir::print(function);
  }
  if (std::string broken = run_engine(engine, function, data.args.data()); !broken.empty()) {
    return broken;
  }
  reference(data.spec, data.args_of_reference().data());
  const std::size_t inputs = data.spec.inputs.size();
  for (std::int64_t row = 0; row < data.rows; ++row) {
    const auto expected = bounded_outputs(data.spec, data.args.data(), row);
    for (std::size_t k = 0; k < data.references.size(); ++k) {
      const RowOperand& operand = data.spec.output_operands[k];
      if (!data.operands[inputs + k]->intact()) return fmt::format("output {}: bytes between", k);
      const std::int64_t count = operand.access == ColumnAccess::contiguous ? data.columns : 1;
      for (std::int64_t i = 0; i < count; ++i) {
        const Bounded& bounded = expected[k][static_cast<std::size_t>(i)];
        const double allowed = tolerance(operand.dtype, bounded);
        const double largest = operand.dtype == DataType::f16 ? 65504 : 3e38;
        if (!(std::abs(bounded.value) + allowed < largest)) continue;
        if (checked != nullptr) ++*checked;
        const std::int64_t offset = i * size_in_bytes(operand.dtype);
        const double kernel =
            ops::read_scalar(operand.dtype, data.operands[inputs + k]->row(row) + offset);
        const double scalar =
            ops::read_scalar(operand.dtype, data.references[k]->row(row) + offset);
        if (!within(kernel, bounded, allowed) || !within(scalar, bounded, allowed)) {
          return fmt::format(
              "rows {} columns {}: output {} [{}, {}] is {}, the reference {}, expected {} +- {}\n",
              data.rows, data.columns, k, row, i, kernel, scalar, bounded.value, allowed);
        }
      }
    }
  }
  return "";
}

namespace {

// Grows a region op by op. Values of one kind (float, i32, boolean) are drawn by dtype.
class RegionGenerator {
 public:
  RegionGenerator(Random& random, int lanes) : random_(random) {
    spec_.lanes = lanes;
    const int inputs = 1 + pick(random_, 4);
    for (int i = 0; i < inputs; ++i) add_input();
    const int count = 1 + pick(random_, 10);
    for (int i = 0; i < count; ++i) add_op();
    const int outputs = 1 + pick(random_, 3);
    for (int i = 0; i < outputs; ++i) {
      add_output(i == 0 ? size() - 1 : pick(random_, size()));
    }
  }

  RowKernel take() && { return std::move(spec_); }

 private:
  struct Value {
    DataType dtype;
    bool varies;
  };

  int size() const { return static_cast<int>(values_.size()); }
  const Value& value(int id) const { return values_[static_cast<std::size_t>(id)]; }
  bool chance(int in) { return pick(random_, in) == 0; }

  void add_input() {
    static const std::vector<DataType> kTypes{DataType::f32, DataType::f32,     DataType::bf16,
                                              DataType::f16, DataType::boolean, DataType::i32};
    RowOperand input;
    input.dtype = spec_.inputs.empty() ? DataType::f32 : pick(random_, kTypes);
    input.access = chance(3) ? ColumnAccess::broadcast : ColumnAccess::contiguous;
    spec_.inputs.push_back(input);
    values_.push_back({input.dtype, input.access == ColumnAccess::contiguous});
  }

  int any() { return pick(random_, size()); }

  // A value of the kind, or a literal.
  int of_type(DataType wanted) {
    std::vector<int> candidates;
    for (int id = 0; id < size(); ++id) {
      const bool fits =
          wanted == DataType::f32 ? is_float(value(id).dtype) : value(id).dtype == wanted;
      if (fits) candidates.push_back(id);
    }
    if (candidates.empty() || chance(8))
      return add(Op::scalar, {}, DataType::f32, pick(random_, 5) - 2);
    return pick(random_, candidates);
  }

  int add(Op op, std::vector<int> operands, DataType dtype, double number = 0, bool flag = false) {
    const bool reduces = op_class(op) == graph::OpClass::reduction;
    const bool varies = !reduces && std::any_of(operands.begin(), operands.end(),
                                                [&](int operand) { return value(operand).varies; });
    spec_.body.push_back({op, std::move(operands), number, flag, dtype});
    values_.push_back({dtype, varies});
    return size() - 1;
  }

  void add_op() {
    switch (pick(random_, 8)) {
      case 0:
        return add_reduction();
      case 1:
        return add_boolean();
      case 2:
        return add_where();
      case 3:
        return add_convert();
      case 4:
        return add_unary();
      case 5:
        add(pick(random_, std::vector{Op::add, Op::sub, Op::mul}),
            {of_type(DataType::i32), of_type(DataType::i32)}, integer_or_float());
        return;
      default:
        add(pick(random_,
                 std::vector{Op::add, Op::sub, Op::mul, Op::div, Op::maximum, Op::minimum}),
            {of_type(DataType::f32), any()}, DataType::f32);
    }
  }

  DataType integer_or_float() { return chance(2) ? DataType::i32 : DataType::f32; }

  void add_unary() {
    static const std::vector<Op> kOps{Op::neg,     Op::abs,  Op::exp,       Op::expm1, Op::log,
                                      Op::log1p,   Op::sin,  Op::cos,       Op::tanh,  Op::erf,
                                      Op::sigmoid, Op::silu, Op::relu,      Op::gelu,  Op::sqrt,
                                      Op::rsqrt,   Op::pow,  Op::reciprocal};
    static const std::vector<double> kExponents{2, 3, 0.5, -0.5, -1};
    const Op op = pick(random_, kOps);
    int x = of_type(DataType::f32);
    if (op == Op::sqrt || op == Op::rsqrt || op == Op::pow || op == Op::log || op == Op::log1p)
      x = add(Op::abs, {x}, DataType::f32);
    add(op, {x}, DataType::f32, op == Op::pow ? pick(random_, kExponents) : 0, chance(2));
  }

  void add_reduction() {
    static const std::vector<Op> kOps{Op::sum,     Op::mean,     Op::amax,
                                      Op::softmax, Op::rms_norm, Op::layer_norm};
    const Op op = pick(random_, kOps);
    std::vector<int> operands{of_type(DataType::f32)};
    if ((op == Op::rms_norm || op == Op::layer_norm) && chance(2)) {
      operands.push_back(of_type(DataType::f32));
    }
    if (op == Op::layer_norm && operands.size() == 2) operands.push_back(of_type(DataType::f32));
    add(op, operands, DataType::f32, 1e-5, chance(2));
  }

  void add_boolean() {
    static const std::vector<Op> kCompares{Op::eq, Op::ne, Op::lt, Op::le, Op::gt, Op::ge};
    static const std::vector<Op> kLogical{Op::logical_and, Op::logical_or};
    if (chance(3)) {
      add(Op::logical_not, {any()}, DataType::boolean);
    } else {
      add(pick(random_, chance(2) ? kCompares : kLogical), {any(), any()}, DataType::boolean);
    }
  }

  void add_where() {
    static const std::vector<DataType> kTypes{DataType::f32, DataType::boolean};
    const DataType type = pick(random_, kTypes);
    add(Op::where, {any(), any(), any()}, type);
  }

  void add_convert() {
    static const std::vector<DataType> kTypes{DataType::f32, DataType::bf16, DataType::f16,
                                              DataType::boolean};
    add(Op::convert, {any()}, pick(random_, kTypes));
  }

  void add_output(int id) {
    static const std::vector<DataType> kTypes{DataType::f32, DataType::bf16, DataType::f16,
                                              DataType::boolean};
    RowOperand output;
    output.dtype =
        value(id).dtype == DataType::i32 && chance(2) ? DataType::i32 : pick(random_, kTypes);
    const bool once = !value(id).varies && chance(2);
    output.access = once ? ColumnAccess::broadcast : ColumnAccess::contiguous;
    spec_.outputs.push_back(id);
    spec_.output_operands.push_back(output);
  }

  Random& random_;
  RowKernel spec_;
  std::vector<Value> values_;
};

}  // namespace

RowKernel random_region(Random& random, int lanes) { return RegionGenerator(random, lanes).take(); }

}  // namespace tilewright
