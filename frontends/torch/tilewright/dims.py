"""Dim: a dimension as a polynomial over named symbols, the twin of ``graph::Dim``.

Captured shapes are sympy expressions; the graph text wants ``2*b*s + past``. This module turns one
into the other, and evaluates dimensions at call time without sympy (a sympy evaluation costs about
100 us, more than a small kernel).

What is no polynomial (``Max(0, past - 15)`` of a sliding window, ``s // 2``) becomes a derived
symbol: to the core one more symbol, whose value the front end computes at each call. Its name says
the expression, so equal expressions are the same symbol in all graphs.

Tested by tests/python/test_lower.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

Terms = tuple[tuple[tuple[str, ...], int], ...]


class NotPolynomialError(ValueError):
    """A size that is neither a polynomial nor integer arithmetic that a call could do."""


class Derived(NamedTuple):
    """A symbol that is computed from others."""

    symbols: tuple[str, ...]  # what `compute` takes, in order; none of them is derived itself
    compute: Callable[..., int]


# By name. A name determines the meaning, so that nothing is ever replaced or removed.
derived: dict[str, Derived] = {}
_INTEGER_OPERATIONS = {"Max", "Min", "FloorDiv", "CleanDiv", "Mod", "PythonMod"}


class Dim:
    """Sorted terms ``(product of symbols, coefficient)`` without zeros: equality is structural.

    Never changed. No dataclass: making one takes a millisecond of each start.
    """

    __slots__ = ("terms",)

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dim) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(self.terms)

    def __repr__(self) -> str:
        return f"Dim({self})"

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
    if type(expression).__name__ in _INTEGER_OPERATIONS:
        name = _derive(expression)
        if type(expression).__name__ in ("Max", "Min") and _seems_negative(derived[name]):
            opposite = sympy.Min if type(expression).__name__ == "Max" else sympy.Max
            negated = [-argument for argument in expression.args]
            return {(_derive(opposite(*negated)),): -1}
        return {(name,): 1}
    raise NotPolynomialError(f"the size {expression} is not a polynomial of its symbols")


def _seems_negative(size: Derived) -> bool:
    """A symbol is never negative to the core; `Min(0, s - 5)` is better said by its negation."""
    samples = [size.compute(*[value] * len(size.symbols)) for value in (2, 1 << 20)]
    return min(samples) < 0 and max(samples) <= 0


def _derive(expression: Any) -> str:
    """The derived symbol that stands for an expression of integers."""
    import sympy
    from torch.utils._sympy.printers import PythonPrinter

    for part in sympy.preorder_traversal(expression):
        known = isinstance(part, sympy.Integer | sympy.Symbol | sympy.Add | sympy.Mul)
        if not known and type(part).__name__ not in _INTEGER_OPERATIONS:
            raise NotPolynomialError(f"the size {expression} is more than integer arithmetic")
    text = PythonPrinter().doprint(expression)
    words = re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")
    name = f"size_{words}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if name not in derived:
        symbols = tuple(sorted(symbol.name for symbol in expression.free_symbols))
        code = f"lambda {', '.join(symbols)}: {text}"
        # Integer arithmetic and names of symbols only: that was checked above.
        compute = eval(code, {"__builtins__": {}, "max": max, "min": min})
        derived[name] = Derived(symbols, compute)
    return name


def roots(names: Iterable[str]) -> set[str]:
    """The symbols that calls have to tell: derived ones are replaced by what they are made of."""
    found: set[str] = set()
    for name in names:
        found.update(derived[name].symbols if name in derived else (name,))
    return found
