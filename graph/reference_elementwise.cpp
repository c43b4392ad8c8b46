// References of the elementwise ops and of reductions.
//
// Tested by interpret_test, filetests/run.
#include <algorithm>
#include <cmath>

#include "graph/reference.h"

namespace tilewright::graph::reference {
namespace {

bool is_integer(const Tensor& tensor) { return !is_float(tensor.dtype); }

template <class Function>
Status unary(Step& step, Function function) {
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    step.result.set(i, function(step.tensor(0).get(i)));
  }
  return {};
}

// function(i, offset in operand 0, offset in operand 1) for every element of the result.
template <class Function>
Status each_pair(Step& step, Function function) {
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    Sizes at = coordinates(i, step.result.shape);
    function(i, offset_of(at, step.tensor(0).shape), offset_of(at, step.tensor(1).shape));
  }
  return {};
}

// In double, or in int64 (modulo 2^64) where the result is an integer.
template <class Real, class Integer>
Status arithmetic(Step& step, Real real, Integer integer) {
  return each_pair(step, [&](std::int64_t i, std::int64_t a, std::int64_t b) {
    if (is_integer(step.result)) {
      step.result.set_integer(i, static_cast<std::int64_t>(integer(
                                     static_cast<std::uint64_t>(step.tensor(0).get_integer(a)),
                                     static_cast<std::uint64_t>(step.tensor(1).get_integer(b)))));
    } else {
      step.result.set(i, real(step.tensor(0).get(a), step.tensor(1).get(b)));
    }
  });
}

template <class Relation>
Status compare(Step& step, Relation relation) {
  const Tensor& left = step.tensor(0);
  const Tensor& right = step.tensor(1);
  bool exact = is_integer(left) && is_integer(right);
  return each_pair(step, [&](std::int64_t i, std::int64_t a, std::int64_t b) {
    step.result.set(i, exact ? relation(left.get_integer(a), right.get_integer(b))
                             : relation(left.get(a), right.get(b)));
  });
}

template <class Real, class Integer>
Status larger(Step& step, Real real, Integer integer) {
  return arithmetic(
      step,
      [&](double a, double b) {
        return std::isnan(a) || std::isnan(b) ? std::nan("") : real(a, b);
      },
      [&](std::uint64_t a, std::uint64_t b) {
        return integer(static_cast<std::int64_t>(a), static_cast<std::int64_t>(b));
      });
}

double sigmoid_of(double x) { return 1 / (1 + std::exp(-x)); }

// function(first offset, length, result offset) for every row.
template <class Function>
Status each_row(Step& step, Function function) {
  std::int64_t columns = step.tensor(0).shape.back();
  for (std::int64_t row = 0; row < step.result.count(); ++row) {
    function(row * columns, columns, row);
  }
  return {};
}

double gelu_of(double x) { return 0.5 * x * (1 + std::erf(x * 0.70710678118654752440)); }

double gelu_tanh_of(double x) {
  constexpr double sqrt_2_over_pi = 0.79788456080286535588;
  return 0.5 * x * (1 + std::tanh(sqrt_2_over_pi * (x + 0.044715 * x * x * x)));
}

}  // namespace

double activate(std::string_view activation, double x) {
  if (activation == "silu") return x * sigmoid_of(x);
  if (activation == "gelu") return gelu_of(x);
  if (activation == "gelu_tanh") return gelu_tanh_of(x);
  if (activation == "relu") return std::isnan(x) ? x : std::max(x, 0.0);
  return x;
}

Status add(Step& step) { return arithmetic(step, std::plus<double>(), std::plus<>()); }
Status sub(Step& step) { return arithmetic(step, std::minus<double>(), std::minus<>()); }
Status mul(Step& step) { return arithmetic(step, std::multiplies<double>(), std::multiplies<>()); }
Status div(Step& step) {
  return each_pair(step, [&](std::int64_t i, std::int64_t a, std::int64_t b) {
    step.result.set(i, step.tensor(0).get(a) / step.tensor(1).get(b));
  });
}
Status maximum(Step& step) {
  return larger(
      step, [](double a, double b) { return std::max(a, b); },
      [](std::int64_t a, std::int64_t b) { return std::max(a, b); });
}
Status minimum(Step& step) {
  return larger(
      step, [](double a, double b) { return std::min(a, b); },
      [](std::int64_t a, std::int64_t b) { return std::min(a, b); });
}

Status pow(Step& step) {
  double exponent = step.node.attribute<double>("exponent");
  return unary(step, [=](double x) { return std::pow(x, exponent); });
}
Status neg(Step& step) {
  if (is_integer(step.result)) {
    for (std::int64_t i = 0; i < step.result.count(); ++i) {
      auto bits = static_cast<std::uint64_t>(step.tensor(0).get_integer(i));
      step.result.set_integer(i, static_cast<std::int64_t>(0 - bits));
    }
    return {};
  }
  return unary(step, [](double x) { return -x; });
}
Status abs(Step& step) {
  if (is_integer(step.result)) {
    for (std::int64_t i = 0; i < step.result.count(); ++i) {
      std::int64_t x = step.tensor(0).get_integer(i);
      auto bits = static_cast<std::uint64_t>(x);
      step.result.set_integer(i, static_cast<std::int64_t>(x < 0 ? 0 - bits : bits));
    }
    return {};
  }
  return unary(step, [](double x) { return std::abs(x); });
}
Status relu(Step& step) {
  return unary(step, [](double x) { return activate("relu", x); });
}
Status reciprocal(Step& step) {
  return unary(step, [](double x) { return 1 / x; });
}
Status sqrt(Step& step) {
  return unary(step, [](double x) { return std::sqrt(x); });
}
Status rsqrt(Step& step) {
  return unary(step, [](double x) { return 1 / std::sqrt(x); });
}
Status exp(Step& step) {
  return unary(step, [](double x) { return std::exp(x); });
}
Status expm1(Step& step) {
  return unary(step, [](double x) { return std::expm1(x); });
}
Status log(Step& step) {
  return unary(step, [](double x) { return std::log(x); });
}
Status log1p(Step& step) {
  return unary(step, [](double x) { return std::log1p(x); });
}
Status sin(Step& step) {
  return unary(step, [](double x) { return std::sin(x); });
}
Status cos(Step& step) {
  return unary(step, [](double x) { return std::cos(x); });
}
Status tanh(Step& step) {
  return unary(step, [](double x) { return std::tanh(x); });
}
Status erf(Step& step) {
  return unary(step, [](double x) { return std::erf(x); });
}
Status sigmoid(Step& step) { return unary(step, sigmoid_of); }
Status silu(Step& step) {
  return unary(step, [](double x) { return activate("silu", x); });
}
Status gelu(Step& step) {
  bool tanh_form = step.node.attribute_or<std::string>("approximate", "none") == "tanh";
  return unary(step, tanh_form ? gelu_tanh_of : gelu_of);
}

Status convert(Step& step) {
  const Tensor& x = step.tensor(0);
  bool to_bool = step.result.dtype == DataType::boolean;
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    if (is_integer(x) && !to_bool) {
      step.result.set_integer(i, x.get_integer(i));
    } else {
      step.result.set(i, x.get(i));
    }
  }
  return {};
}

Status where(Step& step) {
  for (std::int64_t i = 0; i < step.result.count(); ++i) {
    Sizes at = coordinates(i, step.result.shape);
    bool condition = step.tensor(0).get_integer(offset_of(at, step.tensor(0).shape)) != 0;
    const Tensor& chosen = step.tensor(condition ? 1 : 2);
    std::int64_t from = offset_of(at, chosen.shape);
    if (is_integer(step.result)) {
      step.result.set_integer(i, chosen.get_integer(from));
    } else {
      step.result.set(i, chosen.get(from));
    }
  }
  return {};
}

Status eq(Step& step) { return compare(step, std::equal_to<>()); }
Status ne(Step& step) { return compare(step, std::not_equal_to<>()); }
Status lt(Step& step) { return compare(step, std::less<>()); }
Status le(Step& step) { return compare(step, std::less_equal<>()); }
Status gt(Step& step) { return compare(step, std::greater<>()); }
Status ge(Step& step) { return compare(step, std::greater_equal<>()); }
Status logical_and(Step& step) {
  return compare(step, [](auto a, auto b) { return a != 0 && b != 0; });
}
Status logical_or(Step& step) {
  return compare(step, [](auto a, auto b) { return a != 0 || b != 0; });
}
Status logical_not(Step& step) {
  return unary(step, [](double x) { return x == 0 ? 1.0 : 0.0; });
}

Status sum(Step& step) {
  return each_row(step, [&](std::int64_t begin, std::int64_t columns, std::int64_t row) {
    double total = 0;
    std::uint64_t integer = 0;
    for (std::int64_t i = begin; i < begin + columns; ++i) {
      if (is_integer(step.result)) {
        integer += static_cast<std::uint64_t>(step.tensor(0).get_integer(i));
      } else {
        total += step.tensor(0).get(i);
      }
    }
    if (is_integer(step.result)) {
      step.result.set_integer(row, static_cast<std::int64_t>(integer));
    } else {
      step.result.set(row, total);
    }
  });
}

Status mean(Step& step) {
  return each_row(step, [&](std::int64_t begin, std::int64_t columns, std::int64_t row) {
    double total = 0;
    for (std::int64_t i = begin; i < begin + columns; ++i) total += step.tensor(0).get(i);
    step.result.set(row, total / static_cast<double>(columns));
  });
}

Status amax(Step& step) {
  if (step.tensor(0).shape.back() == 0) return Error{"amax of no elements"};
  return each_row(step, [&](std::int64_t begin, std::int64_t columns, std::int64_t row) {
    const Tensor& x = step.tensor(0);
    std::int64_t largest = begin;
    for (std::int64_t i = begin; i < begin + columns; ++i) {
      if (std::isnan(x.get(largest))) break;
      bool more = is_integer(x) ? x.get_integer(i) > x.get_integer(largest)
                                : x.get(i) > x.get(largest) || std::isnan(x.get(i));
      if (more) largest = i;
    }
    step.result.copy(row, x, largest);
  });
}

}  // namespace tilewright::graph::reference
