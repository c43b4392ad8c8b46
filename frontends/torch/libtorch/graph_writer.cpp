// See graph_writer.h. Tested by torchscript_test.
#include "frontends/torch/libtorch/graph_writer.h"

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>

namespace tilewright::libtorch {
namespace {

std::string type_text(at::IntArrayRef shape, at::ScalarType dtype) {
  return dtype_name(dtype) + list_text(shape);
}

std::string joined(const std::vector<std::string>& parts, const char* between) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : between) + part;
  return text;
}

// 16-bit ops take their literals in fp32, as ATen does.
at::ScalarType literal_type(at::ScalarType dtype) {
  const bool narrow = dtype == at::kBFloat16 || dtype == at::kHalf;
  return narrow ? at::kFloat : dtype;
}

}  // namespace

std::string dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "f32";
    case at::kBFloat16:
      return "bf16";
    case at::kHalf:
      return "f16";
    case at::kLong:
      return "i64";
    case at::kInt:
      return "i32";
    case at::kBool:
      return "bool";
    default:
      throw Refused(std::string("tensors of ") + c10::toString(type));
  }
}

std::string list_text(at::IntArrayRef values) {
  std::vector<std::string> parts;
  for (std::int64_t value : values) parts.push_back(std::to_string(value));
  return "[" + joined(parts, ", ") + "]";
}

std::string number_text(double value) {
  if (!std::isfinite(value)) return std::isnan(value) ? "nan" : value < 0 ? "-inf" : "inf";
  std::array<char, 32> buffer;
  const auto end = std::to_chars(buffer.begin(), buffer.end(), value).ptr;
  std::string text(buffer.begin(), end);
  return text.find_first_of(".e") == std::string::npos ? text + ".0" : text;
}

void GraphWriter::add_input(const at::Tensor& tensor) {
  const std::string name = "%x" + std::to_string(parameters_.size());
  parameters_.push_back(name + ": " + type_text(tensor.sizes(), tensor.scalar_type()));
  bind(tensor, name);
}

bool GraphWriter::knows(const at::Tensor& tensor) const {
  return values_.contains(tensor.unsafeGetTensorImpl());
}

void GraphWriter::name_constant(const at::Tensor& tensor, const std::string& name) {
  alive_.push_back(tensor);
  wanted_names_[tensor.unsafeGetTensorImpl()] = name;
}

std::string GraphWriter::operand(const at::Tensor& tensor, std::optional<at::ScalarType> dtype) {
  const at::ScalarType own = tensor.scalar_type();
  if (auto found = values_.find(tensor.unsafeGetTensorImpl()); found != values_.end()) {
    return convert(found->second, tensor.sizes(), own, dtype.value_or(own));
  }
  if (tensor.dim() == 0) return literal(tensor.item().toDouble(), dtype.value_or(own));
  std::string& value = constant_values_[tensor.unsafeGetTensorImpl()];
  if (value.empty()) {
    const auto wanted = wanted_names_.find(tensor.unsafeGetTensorImpl());
    std::string name = wanted == wanted_names_.end() ? "" : wanted->second;
    if (name.empty() || constants_.contains(name)) {
      name = "constant." + std::to_string(constants_.size());
    }
    alive_.push_back(tensor);
    constants_[name] = tensor.contiguous();
    value = "%w." + name;
    sources_.push_back(value + " = const \"" + name + "\" : " + type_text(tensor.sizes(), own));
  }
  return convert(value, tensor.sizes(), own, dtype.value_or(own));
}

std::string GraphWriter::literal(double value, at::ScalarType dtype) {
  const at::ScalarType type = literal_type(dtype);
  std::string& name = literals_[number_text(value) + dtype_name(type)];
  if (name.empty()) {
    name = "%c" + std::to_string(literals_.size());
    const std::string which = type == at::kFloat ? "" : "dtype = " + dtype_name(type) + ", ";
    sources_.push_back(name + " = scalar() {" + which + "value = " + number_text(value) +
                       "} : " + type_text({}, type));
  }
  return name;
}

std::string GraphWriter::append(const std::string& op, const std::vector<std::string>& operands,
                                const std::string& attributes, at::IntArrayRef shape,
                                at::ScalarType dtype) {
  const std::string name = "%" + op + "." + std::to_string(count_++);
  const std::string braces = attributes.empty() ? "" : " {" + attributes + "}";
  lines_.push_back(name + " = " + op + "(" + joined(operands, ", ") + ")" + braces + " : " +
                   type_text(shape, dtype));
  return name;
}

void GraphWriter::bind(const at::Tensor& tensor, const std::string& value) {
  alive_.push_back(tensor);
  values_[tensor.unsafeGetTensorImpl()] = value;
}

std::string GraphWriter::convert(const std::string& value, at::IntArrayRef shape,
                                 at::ScalarType from, at::ScalarType to) {
  if (from == to) return value;
  return append("convert", {value}, "dtype = " + dtype_name(to), shape, to);
}

std::string GraphWriter::reshape(const std::string& value, at::IntArrayRef from, at::IntArrayRef to,
                                 at::ScalarType dtype) {
  if (from == to) return value;
  return append("reshape", {value}, "shape = " + list_text(to), to, dtype);
}

std::string GraphWriter::finish(const std::vector<at::Tensor>& results) const {
  std::vector<std::string> types, names;
  for (const at::Tensor& result : results) {
    const auto found = values_.find(result.unsafeGetTensorImpl());
    if (found == values_.end()) throw Refused("a result does not depend on the inputs");
    if (found->second.starts_with("%x")) throw Refused("a result is an input itself");
    types.push_back(type_text(result.sizes(), result.scalar_type()));
    names.push_back(found->second);
  }
  std::string text =
      "graph forward(" + joined(parameters_, ", ") + ") -> (" + joined(types, ", ") + ") {\n";
  for (const auto* lines : {&sources_, &lines_}) {
    for (const std::string& line : *lines) text += "  " + line + "\n";
  }
  return text + "  return " + joined(names, ", ") + "\n}\n";
}

}  // namespace tilewright::libtorch
