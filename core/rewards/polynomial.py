"""Exact arithmetic on what short mathematical answers are made of: fractions, square roots, π, variables.

A number is a ratio of two polynomials over Q, whose terms are √n · π^i · x^j …, n squarefree. Such terms are linearly
independent over Q, so that two ratios are equal exactly where a·d − b·c has no term left: no floats, no simplifier.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, isqrt

Monomial = tuple[int, tuple[tuple[str, int], ...]]  # (n of √n, ((name, exponent), …) sorted)
Terms = Mapping[Monomial, Fraction]

MAX_TERMS, MAX_BITS, MAX_EXPONENT = 300, 16_384, 10_000  # beyond these, an answer is there to hang the judge


class NotExact(ValueError):
    """Outside of what this arithmetic can express."""


class TooLarge(ValueError):
    """Beyond the limits; no other judge should try."""


def add(a: Terms, b: Terms, sign: int = 1) -> Terms:
    total = dict(a)
    for key, value in b.items():
        total[key] = total.get(key, Fraction(0)) + sign * value
    return limited(total)


def multiply(a: Terms, b: Terms) -> Terms:
    if len(a) * len(b) > MAX_TERMS**2 // 4:
        raise TooLarge("an expression too large to compare")
    total: dict[Monomial, Fraction] = {}
    for (n, names), value in a.items():
        for (m, others), factor in b.items():
            common = gcd(n, m)  # √n √m = g √(nm / g²)
            powers = dict(names)
            for name, exponent in others:
                powers[name] = powers.get(name, 0) + exponent
            key = (n * m // common**2, tuple(sorted((k, e) for k, e in powers.items() if e)))
            total[key] = total.get(key, Fraction(0)) + common * value * factor
    return limited(total)


def limited(terms: Terms) -> Terms:
    terms = {key: value for key, value in terms.items() if value}
    sizes = [value.numerator.bit_length() + value.denominator.bit_length() for value in terms.values()]
    if len(terms) > MAX_TERMS or max(sizes, default=0) > MAX_BITS:
        raise TooLarge("an expression too large to compare")
    return terms


@dataclass(frozen=True)
class Ratio:
    """numerator / denominator."""

    top: Terms
    bottom: Terms

    @classmethod
    def of(cls, value: Fraction | int, name: str = "", root: int = 1) -> "Ratio":
        """value · √root · name."""
        return cls(limited({(root, ((name, 1),) if name else ()): Fraction(value)}), ONE)

    def plus(self, other: "Ratio", sign: int = 1) -> "Ratio":
        crossed = multiply(self.top, other.bottom), multiply(other.top, self.bottom)
        return Ratio(add(*crossed, sign), multiply(self.bottom, other.bottom))

    def times(self, other: "Ratio") -> "Ratio":
        return Ratio(multiply(self.top, other.top), multiply(self.bottom, other.bottom))

    def over(self, other: "Ratio") -> "Ratio":
        if not other.top:
            raise NotExact("division by zero")
        return self.times(Ratio(other.bottom, other.top))

    def power(self, exponent: "Ratio") -> "Ratio":
        e = exponent.fraction()
        if e.denominator == 2:
            return self.root().power(Ratio.of(e.numerator))
        if e.denominator != 1:
            raise NotExact(f"the exponent {e}")
        if abs(e) > MAX_EXPONENT:
            raise TooLarge(f"the exponent {e}")
        result = Ratio.of(1)
        for bit in bin(abs(e.numerator))[2:]:
            result = result.times(result)
            result = result.times(self) if bit == "1" else result
        return result if e >= 0 else Ratio.of(1).over(result)

    def root(self) -> "Ratio":
        """√self, of a rational ≥ 0: √(p/q) = √(pq) / q."""
        value = self.fraction()
        if value < 0:
            raise NotExact("the root of a negative number")
        outside, inside = square_part(value.numerator * value.denominator)
        return Ratio.of(Fraction(outside, value.denominator), root=inside)

    def fraction(self) -> Fraction:
        """The rational number that this is. Raises: NotExact."""
        if not self.top:
            return Fraction(0)
        key = next(iter(self.bottom))
        value = self.top.get(key, Fraction(0)) / self.bottom[key]
        if add(self.top, {k: value * v for k, v in self.bottom.items()}, -1):
            raise NotExact("not a rational number")
        return value

    def same(self, other: "Ratio") -> bool:
        return not self.plus(other, -1).top


ONE: Terms = {(1, ()): Fraction(1)}


def square_part(n: int) -> tuple[int, int]:
    """(a, b) with n = a² b and b squarefree, as far as factors below 10,000 tell."""
    if n == 0:
        return 0, 1
    outside, inside, p = 1, 1, 2
    while p * p <= n and p < 10_000:
        while n % (p * p) == 0:
            n, outside = n // (p * p), outside * p
        if n % p == 0:
            n, inside = n // p, inside * p
        p += 1
    whole = isqrt(n)
    return (outside * whole, inside) if whole * whole == n else (outside, inside * n)
