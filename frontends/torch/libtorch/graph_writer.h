// GraphWriter: graph text (graph/graph.h) written while a TorchScript graph runs once with real
// tensors. A tensor is either a value of the text, known by the identity of its TensorImpl, or
// whatever does not depend on the inputs: a constant.
//
// Not thread-safe. Tested by torchscript_test.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace tilewright::libtorch {

// Why a graph stays with LibTorch.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The graph's name of an element type ("f32"). Throws Refused.
std::string dtype_name(at::ScalarType type);

// "[2, 9]", of sizes and other lists.
std::string list_text(at::IntArrayRef values);

// A number as the text has it.
std::string number_text(double value);

class GraphWriter {
 public:
  // REQUIRES: a tensor object of its own for each input.
  void add_input(const at::Tensor& tensor);

  bool knows(const at::Tensor& tensor) const;

  // What a weight is called; it becomes a constant only when something reads it.
  void name_constant(const at::Tensor& tensor, const std::string& name);

  // The text's value for a tensor: known, or a constant. dtype: what the op computes in; a 0-d
  // constant becomes a literal of it, another type is converted to it.
  std::string operand(const at::Tensor& tensor, std::optional<at::ScalarType> dtype = {});
  std::string literal(double value, at::ScalarType dtype);

  // One line; returns the new value's name. attributes: "axis = 1", without braces.
  std::string append(const std::string& op, const std::vector<std::string>& operands,
                     const std::string& attributes, at::IntArrayRef shape, at::ScalarType dtype);

  // From now on `tensor` is this value.
  void bind(const at::Tensor& tensor, const std::string& value);

  std::string convert(const std::string& value, at::IntArrayRef shape, at::ScalarType from,
                      at::ScalarType to);
  std::string reshape(const std::string& value, at::IntArrayRef from, at::IntArrayRef to,
                      at::ScalarType dtype);

  // The whole text. Throws Refused where a result is a constant or an input itself.
  std::string finish(const std::vector<at::Tensor>& results) const;

  const std::map<std::string, at::Tensor>& constants() const { return constants_; }

 private:
  std::vector<std::string> parameters_, sources_, lines_;
  std::vector<at::Tensor> alive_;  // an identity is one while its tensor lives
  std::unordered_map<const at::TensorImpl*, std::string> values_, constant_values_;
  std::unordered_map<const at::TensorImpl*, std::string> wanted_names_;
  std::map<std::string, std::string> literals_;
  std::map<std::string, at::Tensor> constants_;
  int count_ = 0;
};

}  // namespace tilewright::libtorch
