"""Dim: a dimension as a polynomial over named symbols, the twin of ``graph::Dim``.

Captured shapes are sympy expressions; the graph text wants ``2*b*s + past``. This module turns one
into the other, and evaluates dimensions at call time without sympy (a sympy evaluation costs about
100 us, more than a small kernel).

Tested by tests/python/test_lower.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Terms = tuple[tuple[tuple[str, ...], int], ...]


class NotPolynomialError(ValueError):
    """A size expression (floor division, Max, ...) that the graph IR cannot say."""


@dataclass(frozen=True)
class Dim:
    """Sorted terms ``(product of symbols, coefficient)`` without zeros: equality is structural."""

    terms: Terms

    @staticmethod
    def of(value: Any) -> Dim:
        """From an int, a SymInt or a sympy expression. Raises NotPolynomialError."""
        if isinstance(value, Dim):
            return value
        if isinstance(value, int):
            return _from_map({(): value})
        node = getattr(value, "node", None)
        return _from_map(_terms(value if node is None else node.expr))

    @staticmethod
    def symbol(name: str) -> Dim:
        return _from_map({(name,): 1})

    @property
    def constant(self) -> int | None:
        """The value if it has no symbols."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and not self.terms[0][0]:
            return self.terms[0][1]
        return None

    def symbols(self) -> set[str]:
        return {name for product, _ in self.terms for name in product}

    def evaluate(self, values: Mapping[str, int]) -> int:
        """KeyError names a symbol without a value."""
        total = 0
        for product, coefficient in self.terms:
            for name in product:
                coefficient *= values[name]
            total += coefficient
        return total

    def __add__(self, other: Dim | int) -> Dim:
        terms = dict(self.terms)
        for product, coefficient in Dim.of(other).terms:
            terms[product] = terms.get(product, 0) + coefficient
        return _from_map(terms)

    def __mul__(self, other: Dim | int) -> Dim:
        return _from_map(_multiply(dict(self.terms), dict(Dim.of(other).terms)))

    def __sub__(self, other: Dim | int) -> Dim:
        return self + Dim.of(other) * -1

    def __str__(self) -> str:
        if not self.terms:
            return "0"
        text = ""
        # Highest degree first, then by name, as the core prints: `2*b*s + past + 1`.
        for product, coefficient in sorted(self.terms, key=lambda term: (-len(term[0]), term[0])):
            magnitude = abs(coefficient)
            factors = list(product) if product and magnitude == 1 else [str(magnitude), *product]
            sign = "-" if coefficient < 0 else "+"
            if text:
                text += f" {sign} "
            elif coefficient < 0:
                text = "-"
            text += "*".join(factors)
        return text


def _from_map(terms: Mapping[tuple[str, ...], int]) -> Dim:
    return Dim(tuple(sorted((k, v) for k, v in terms.items() if v != 0)))


def _multiply(
    a: Mapping[tuple[str, ...], int], b: Mapping[tuple[str, ...], int]
) -> dict[tuple[str, ...], int]:
    product: dict[tuple[str, ...], int] = {}
    for left, x in a.items():
        for right, y in b.items():
            key = tuple(sorted(left + right))
            product[key] = product.get(key, 0) + x * y
    return product


def _terms(expression: Any) -> dict[tuple[str, ...], int]:
    """Walks a sympy expression; sympy's own Poly costs milliseconds."""
    import sympy

    if isinstance(expression, int | sympy.Integer):
        return {(): int(expression)}
    if isinstance(expression, sympy.Symbol):
        return {(expression.name,): 1}
    if isinstance(expression, sympy.Add):
        total: dict[tuple[str, ...], int] = {}
        for argument in expression.args:
            for product, coefficient in _terms(argument).items():
                total[product] = total.get(product, 0) + coefficient
        return total
    if isinstance(expression, sympy.Mul):
        result: dict[tuple[str, ...], int] = {(): 1}
        for argument in expression.args:
            result = _multiply(result, _terms(argument))
        return result
    if isinstance(expression, sympy.Pow):
        base, exponent = expression.args
        if isinstance(exponent, sympy.Integer) and 0 <= int(exponent) <= 8:
            result = {(): 1}
            for _ in range(int(exponent)):
                result = _multiply(result, _terms(base))
            return result
    raise NotPolynomialError(f"the size {expression} is not a polynomial of its symbols")
