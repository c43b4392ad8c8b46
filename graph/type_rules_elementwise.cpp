// Type rules of elementwise ops and reductions.
//
// Integers: arithmetic stays integer, `div` and the real functions give f32, as in ATen.
//
// Tested by graph_test, filetests/verify.
#include <algorithm>
#include <array>

#include "graph/type_rules.h"

namespace tilewright::graph::type_rules {
namespace {

Result<Type> binary(const Arguments& a, DataType dtype) {
  Result<Shape> shape = broadcast(a.shape(0), a.shape(1));
  if (!shape) return shape.error();
  return tensor(dtype, std::move(*shape));
}

Result<Type> arithmetic(const Arguments& a) {
  DataType dtype = promote(a.operands);
  if (dtype == DataType::boolean) return error("{} of two bools", name(a.op));
  return binary(a, dtype);
}

Result<Type> compare(const Arguments& a) { return binary(a, DataType::boolean); }

// A function with real values.
Result<Type> real(const Arguments& a) {
  DataType dtype = a.operand(0).dtype;
  return tensor(is_float(dtype) ? dtype : DataType::f32, a.shape(0));
}

Result<Type> keep_number(const Arguments& a) {
  if (a.operand(0).dtype == DataType::boolean) return error("{} of a bool", name(a.op));
  return tensor(a.operand(0).dtype, a.shape(0));
}

Result<Type> reduce(const Arguments& a, DataType dtype) {
  Shape shape = a.shape(0);
  if (shape.empty()) return error("{} needs at least one axis", name(a.op));
  shape.back() = 1;
  return tensor(dtype, std::move(shape));
}

Status require_float(const Arguments& a) {
  if (is_float(a.operand(0).dtype)) return {};
  return error("{} needs a floating point operand, found {}", name(a.op), print(a.operand(0)));
}

}  // namespace

Result<Type> add(const Arguments& a) { return arithmetic(a); }
Result<Type> sub(const Arguments& a) { return arithmetic(a); }
Result<Type> mul(const Arguments& a) { return arithmetic(a); }
Result<Type> maximum(const Arguments& a) { return arithmetic(a); }
Result<Type> minimum(const Arguments& a) { return arithmetic(a); }
Result<Type> div(const Arguments& a) {
  DataType dtype = promote(a.operands);
  return binary(a, is_float(dtype) ? dtype : DataType::f32);
}

Result<Type> pow(const Arguments& a) {
  constexpr std::array exponents{2.0, 3.0, 0.5, -0.5, -1.0};
  double exponent = a.attribute<double>("exponent");
  if (std::find(exponents.begin(), exponents.end(), exponent) == exponents.end()) {
    return error("exponent must be 2, 3, 0.5, -0.5 or -1");
  }
  return real(a);
}

Result<Type> neg(const Arguments& a) { return keep_number(a); }
Result<Type> abs(const Arguments& a) { return keep_number(a); }
Result<Type> relu(const Arguments& a) { return keep_number(a); }
Result<Type> reciprocal(const Arguments& a) { return real(a); }
Result<Type> sqrt(const Arguments& a) { return real(a); }
Result<Type> rsqrt(const Arguments& a) { return real(a); }
Result<Type> exp(const Arguments& a) { return real(a); }
Result<Type> expm1(const Arguments& a) { return real(a); }
Result<Type> log(const Arguments& a) { return real(a); }
Result<Type> log1p(const Arguments& a) { return real(a); }
Result<Type> sin(const Arguments& a) { return real(a); }
Result<Type> cos(const Arguments& a) { return real(a); }
Result<Type> tanh(const Arguments& a) { return real(a); }
Result<Type> erf(const Arguments& a) { return real(a); }
Result<Type> sigmoid(const Arguments& a) { return real(a); }

Result<Type> silu(const Arguments& a) {
  if (Status status = require_float(a); !status) return status.error();
  return real(a);
}

Result<Type> gelu(const Arguments& a) {
  if (Status status = require_float(a); !status) return status.error();
  std::string approximate = a.attribute_or<std::string>("approximate", "none");
  if (approximate != "none" && approximate != "tanh") {
    return error("approximate must be \"none\" or \"tanh\"");
  }
  return real(a);
}

Result<Type> convert(const Arguments& a) {
  return tensor(a.attribute<DataType>("dtype"), a.shape(0));
}

Result<Type> where(const Arguments& a) {
  if (a.operand(0).dtype != DataType::boolean) {
    return error("where needs a bool condition, found {}", print(a.operand(0)));
  }
  Result<Shape> shape = broadcast(a.shape(1), a.shape(2));
  if (shape) shape = broadcast(a.shape(0), *shape);
  if (!shape) return shape.error();
  return tensor(promote(a.operands.subspan(1)), std::move(*shape));
}

Result<Type> eq(const Arguments& a) { return compare(a); }
Result<Type> ne(const Arguments& a) { return compare(a); }
Result<Type> lt(const Arguments& a) { return compare(a); }
Result<Type> le(const Arguments& a) { return compare(a); }
Result<Type> gt(const Arguments& a) { return compare(a); }
Result<Type> ge(const Arguments& a) { return compare(a); }
Result<Type> logical_and(const Arguments& a) { return compare(a); }
Result<Type> logical_or(const Arguments& a) { return compare(a); }
Result<Type> logical_not(const Arguments& a) { return tensor(DataType::boolean, a.shape(0)); }

Result<Type> sum(const Arguments& a) {
  DataType dtype = a.operand(0).dtype;
  return reduce(a, is_float(dtype) ? dtype : DataType::i64);
}
Result<Type> mean(const Arguments& a) {
  if (Status status = require_float(a); !status) return status.error();
  return reduce(a, a.operand(0).dtype);
}
Result<Type> amax(const Arguments& a) { return reduce(a, a.operand(0).dtype); }

Result<Type> softmax(const Arguments& a) {
  if (Status status = require_float(a); !status) return status.error();
  if (a.shape(0).empty()) return error("softmax needs at least one axis");
  return real(a);
}

}  // namespace tilewright::graph::type_rules
