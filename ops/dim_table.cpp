// DimTable: see dim_table.h. Tested by layout_test.
#include "ops/dim_table.h"

namespace tilewright::ops {

int DimTable::symbol_index(const std::string& name) {
  auto [found, added] = symbol_indices_.try_emplace(name, static_cast<int>(symbols_.size()));
  if (added) symbols_.push_back(name);
  return found->second;
}

DimIndex DimTable::intern(const graph::Dim& dim) {
  auto [found, added] =
      indices_.try_emplace(dim.print(), static_cast<DimIndex>(polynomials_.size()));
  if (added) {
    std::vector<Term> terms;
    for (const auto& [symbols, coefficient] : dim.terms()) {
      Term term{coefficient, {}};
      for (const std::string& symbol : symbols) term.symbols.push_back(symbol_index(symbol));
      terms.push_back(std::move(term));
    }
    polynomials_.push_back(std::move(terms));
  }
  return found->second;
}

int DimTable::symbol_of(DimIndex dim) const {
  const std::vector<Term>& terms = polynomials_[static_cast<std::size_t>(dim)];
  const bool plain = terms.size() == 1 && terms[0].coefficient == 1 && terms[0].symbols.size() == 1;
  return plain ? terms[0].symbols[0] : -1;
}

void DimTable::evaluate(std::span<const std::int64_t> symbol_values,
                        std::vector<std::int64_t>& values) const {
  values.resize(polynomials_.size());
  for (std::size_t i = 0; i < polynomials_.size(); ++i) {
    std::int64_t sum = 0;
    for (const Term& term : polynomials_[i]) {
      std::int64_t product = term.coefficient;
      for (int symbol : term.symbols) product *= symbol_values[static_cast<std::size_t>(symbol)];
      sum += product;
    }
    values[i] = sum;
  }
}

}  // namespace tilewright::ops
