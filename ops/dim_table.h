// DimTable: every distinct size, offset and stride of a program, evaluated together once per run.
//
// compile() interns polynomials (graph::Dim) and steps hold small indices; a run binds the symbols
// and evaluates the table in one pass over flat terms, without maps or allocation. A decode step
// whose cache length is symbolic costs microseconds here.
//
// Tested by layout_test.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "graph/type.h"

namespace tilewright::ops {

// Index into a DimTable's values.
enum class DimIndex : std::int32_t {};

class DimTable {
 public:
  DimIndex intern(const graph::Dim& dim);

  // Symbols in order of first appearance; bind() fills their values.
  const std::vector<std::string>& symbols() const { return symbols_; }

  // Which symbol a dim is, or -1: a number, or computed from symbols.
  int symbol_of(DimIndex dim) const;

  // values[i] of every interned dim. REQUIRES: symbol_values.size() == symbols().size().
  void evaluate(std::span<const std::int64_t> symbol_values,
                std::vector<std::int64_t>& values) const;

 private:
  struct Term {
    std::int64_t coefficient;
    std::vector<int> symbols;
  };
  int symbol_index(const std::string& name);

  std::vector<std::string> symbols_;
  std::map<std::string, int, std::less<>> symbol_indices_;
  std::map<std::string, DimIndex, std::less<>> indices_;  // by printed form
  std::vector<std::vector<Term>> polynomials_;
};

}  // namespace tilewright::ops
