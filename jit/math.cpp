// The polynomials behind math.h.
//
// Rules that hold throughout: constants are loaded where they are used, so few registers live long;
// Horner steps are one fused operation each; a clamp puts its constant first, because vmax and vmin
// return the second operand when either is NaN, and so NaN passes. No call has two arguments that
// append code: C++ leaves their order open, and emission must be deterministic.
//
// Tested by math_test.
#include "jit/math.h"

#include <cassert>
#include <initializer_list>
#include <limits>

namespace tilewright::jit::math {
namespace {

constexpr std::uint32_t kSignBit = 0x80000000u;
constexpr float kLog2E = 1.44269504088896341f;
// ln 2 in two parts; a multiple of the first by an integer below 2^15 is exact.
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;

Reg polynomial(Builder& b, Reg x, std::initializer_list<float> highest_first) {
  const float* next = highest_first.begin();
  Reg sum = b.splat(*next++);
  while (next != highest_first.end()) {
    Reg step = b.splat(*next++);
    b.fma(step, sum, x);
    sum = step;
  }
  return sum;
}

Reg at_least(Builder& b, float low, Reg x) { return b.vmax(b.splat(low), x); }
Reg at_most(Builder& b, float high, Reg x) { return b.vmin(b.splat(high), x); }

Reg magnitude(Builder& b, Reg x) { return b.vand(x, b.splat_bits(~kSignBit)); }

Reg with_sign_of(Builder& b, Reg x, Reg value) {
  Reg sign = b.vand(x, b.splat_bits(kSignBit));
  return b.vor(value, sign);
}

// 2^i for an integer vector, -126 <= i <= 127.
Reg power_of_two(Builder& b, Reg i) { return b.vshift_left(b.iadd(i, b.splat_bits(127)), 23); }

// value * 2^n, rounded once, for integral n in [-252, 254].
Reg scale_by_power(Builder& b, Reg value, Reg n) {
  if (b.has_scalef()) return b.scalef(value, n);
  // Two factors, each a normal float: the first product is exact, the second overflows to infinity
  // or underflows gradually. Costs 8 instructions; vscalefps is 2 micro-operations.
  Reg i = b.to_i32(n);
  Reg half = b.vshift_right_signed(i, 1);
  Reg rest = b.isub(i, half);
  value = b.vmul(value, power_of_two(b, half));
  return b.vmul(value, power_of_two(b, rest));
}

// e^x = p * 2^n, with p in [0.7, 1.42] and n integral.
struct ExpParts {
  Reg p, n;
};

// (e^r - 1) / r for |r| <= ln(2) / 2. Fitted for this file with least relative maximum of
// e^r, 3.2e-9.
Reg exp_slope(Builder& b, Reg r) {
  return polynomial(b, r,
                    {0.0013818938750773668f, 0.008368703536689281f, 0.04166828840970993f,
                     0.1666652113199234f, 0.4999999403953552f, 1.0f});
}

Reg exp_polynomial(Builder& b, Reg r) {
  Reg slope = exp_slope(b, r);
  Reg sum = b.splat(1.0f);
  b.fma(sum, slope, r);
  return sum;
}

// r = x - n * ln 2, by Cody and Waite.
struct Reduced {
  Reg r, n;
};

Reduced reduce_for_exp(Builder& b, Reg x) {
  Reg n = b.vround(b.vmul(x, b.splat(kLog2E)));
  Reg r = b.copy(x);
  b.fnma(r, n, b.splat(kLn2High));
  b.fnma(r, n, b.splat(kLn2Low));
  return {r, n};
}

ExpParts exp_parts(Builder& b, Reg x) {
  const Reduced reduced = reduce_for_exp(b, x);
  return {exp_polynomial(b, reduced.r), reduced.n};
}

// 1 + e^y as inverse * sum, where inverse = 2^-h and h = max(n / 2, 0): everything stays in range
// for every y, so numerator * inverse / sum neither overflows nor loses a subnormal result. It
// costs no more than scaling e^y and adding 1, and rounds less: e^y itself is never formed.
struct OnePlusExp {
  Reg inverse, sum;
};

OnePlusExp one_plus_exp(Builder& b, Reg y) {
  const Reduced reduced = reduce_for_exp(b, at_most(b, 126.0f, at_least(b, -80.0f, y)));
  Reg increment = b.vmul(exp_slope(b, reduced.r), reduced.r);  // e^r - 1
  Reg n = b.to_i32(reduced.n);
  Reg negative = b.vshift_right_signed(n, 31);
  Reg half = b.vandn(negative, b.vshift_right_signed(n, 1));
  Reg rest = power_of_two(b, b.isub(n, half));
  Reg inverse = b.vshift_left(b.isub(b.splat_bits(127), half), 23);
  // In this order: the fused step's error is small beside `rest`, which is added last.
  Reg sum = b.copy(inverse);
  b.fma(sum, increment, rest);
  return {inverse, b.vadd(sum, rest)};
}

// x / (1 + e^y). Below -126 the quotients of silu and gelu_tanh are zero already, so x may be
// clamped there, which makes -infinity give a zero.
Reg over_one_plus_exp(Builder& b, Reg x, Reg y) {
  const OnePlusExp denominator = one_plus_exp(b, y);
  Reg numerator = b.vmul(at_least(b, -126.0f, x), denominator.inverse);
  return b.vdiv(numerator, denominator.sum);
}

Reg negate(Builder& b, Reg x) { return b.vxor(x, b.splat_bits(kSignBit)); }

// The multiple of pi/2 nearest to x, and the rest.
struct Quadrant {
  Reg rest;   // |rest| <= 0.85 for |x| <= 1e6
  Reg index;  // i32; only its last two bits matter
};

// pi/2 in three parts of 24 bits. With fused steps the first difference is exact for |x| < 2^20
// (its terms are multiples of 2^-23 and it is below 1), and the later ones err relative to the
// rest.
Quadrant reduce_to_quadrant(Builder& b, Reg x) {
  constexpr float kTwoOverPi = 0.636619772367581343f;
  constexpr float kPart1 = 0x1.921fb6p+0f, kPart2 = -0x1.777a5cp-25f, kPart3 = -0x1.ee59dap-50f;
  Reg q = b.vround(b.vmul(x, b.splat(kTwoOverPi)));
  Reg r = b.copy(x);
  b.fnma(r, q, b.splat(kPart1));
  b.fnma(r, q, b.splat(kPart2));
  b.fnma(r, q, b.splat(kPart3));
  // Far outside the bound r is noise; kept in range, it still gives a value in [-1, 1].
  r = at_most(b, 0.87f, at_least(b, -0.87f, r));
  return {r, b.to_i32(q)};
}

// sin of the reduced angle in even quadrants, cos in odd ones, with the quadrant's sign.
Reg sine_of_quadrant(Builder& b, const Quadrant& quadrant) {
  const Reg r = quadrant.rest;
  Reg s = b.vmul(r, r);
  Reg sine = b.copy(r);
  Reg sine_series =
      polynomial(b, s, {-0.00019441410946342008f, 0.008331566054049777f, -0.16666644308986045f});
  b.fma(sine, b.vmul(r, s), sine_series);
  Reg cosine = b.splat(1.0f);
  b.fnma(cosine, s, b.splat(0.5f));
  Reg cosine_series =
      polynomial(b, s, {2.4348506977315497e-05f, -0.0013886505529582815f, 0.041666627404215326f});
  b.fma(cosine, b.vmul(s, s), cosine_series);

  Reg lowest_bit = b.vshift_left(quadrant.index, 31);
  Reg value = b.select(b.igreater(b.zero(), lowest_bit), cosine, sine);
  Reg sign = b.vshift_left(b.vshift_right(quadrant.index, 1), 31);
  return b.vxor(value, sign);
}

}  // namespace

Reg exp(Builder& b, Reg x) {
  // e^89 overflows and e^-104 rounds to zero, by the scaling itself.
  const ExpParts parts = exp_parts(b, at_most(b, 89.0f, at_least(b, -104.0f, x)));
  return scale_by_power(b, parts.p, parts.n);
}

Reg exp_to_one(Builder& b, Reg x) {
  const ExpParts parts = exp_parts(b, at_least(b, b.has_scalef() ? -104.0f : -88.0f, x));
  if (b.has_scalef()) return b.scalef(parts.p, parts.n);
  // Below -87.7 n is -127, which as an exponent field is a factor of zero.
  return b.vmul(parts.p, power_of_two(b, b.to_i32(parts.n)));
}

Reg exp2(Builder& b, Reg x) {
  x = at_most(b, 129.0f, at_least(b, -151.0f, x));
  Reg n = b.vround(x);
  Reg p = polynomial(b, b.vsub(x, n),
                     {0.0001532784226583317f, 0.0013390998356044292f, 0.009618503041565418f,
                      0.05550359562039375f, 0.24022647738456726f, 0.6931471824645996f, 1.0f});
  return scale_by_power(b, p, n);
}

Reg log(Builder& b, Reg x) {
  // x = m * 2^e with m in [sqrt(1/2), sqrt(2)); a subnormal x is multiplied by 2^23 first.
  Reg subnormal = b.less(x, b.splat(std::numeric_limits<float>::min()));
  Reg scaled = b.select(subnormal, b.vmul(x, b.splat(0x1p23f)), x);
  Reg e = b.vshift_right_signed(b.isub(scaled, b.splat_bits(0x3f3504f3u)), 23);
  Reg m = b.isub(scaled, b.vshift_left(e, 23));
  Reg exponent = b.to_f32(e);
  exponent = b.select(subnormal, b.vsub(exponent, b.splat(23.0f)), exponent);

  // log(1 + f) = f - f^2 / 2 + f^3 * P(f); the parts of e * ln 2 join in order of size.
  Reg f = b.vsub(m, b.splat(1.0f));
  Reg square = b.vmul(f, f);
  Reg series = polynomial(b, f,
                          {-0.0763449669f, 0.127615765f, -0.131601825f, 0.142017573f, -0.166233569f,
                           0.200012267f, -0.250008196f, 0.333333313f});
  Reg sum = b.vmul(b.vmul(f, square), series);
  b.fma(sum, exponent, b.splat(kLn2Low));
  b.fnma(sum, square, b.splat(0.5f));
  sum = b.vadd(f, sum);
  b.fma(sum, exponent, b.splat(kLn2High));

  // The integer steps hide what was not a positive finite number: +inf and NaN give themselves,
  // zero gives -inf, a negative number NaN.
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  sum = b.select(b.less(x, b.splat(kInfinity)), sum, x);
  Reg zero = b.zero();
  Reg not_positive = b.vdiv(b.splat(-1.0f), magnitude(b, x));  // -inf at zero
  Reg nan = b.splat(std::numeric_limits<float>::quiet_NaN());
  not_positive = b.select(b.less(x, zero), nan, not_positive);
  return b.select(b.less_equal(x, zero), not_positive, sum);
}

Reg log1p(Builder& b, Reg x) {
  // What 1 + x loses in rounding, x - (u - 1), comes back by the slope of log at u.
  Reg one = b.splat(1.0f);
  Reg u = b.vadd(x, one);
  Reg lost = b.vdiv(b.vsub(x, b.vsub(u, one)), u);
  Reg result = log(b, u);
  Reg infinity = b.splat(std::numeric_limits<float>::infinity());
  Reg finite = b.less(magnitude(b, result), infinity);
  result = b.select(finite, b.vadd(result, lost), result);
  return b.select(b.equal(u, one), x, result);
}

Reg expm1(Builder& b, Reg x) {
  // 2^n e^r - 1 = 2 (2^(n-1) (e^r - 1) + 2^(n-1) - 1/2): nothing cancels near zero, where n is 0,
  // and 2^(n-1) is in range where the result is.
  const Reduced reduced = reduce_for_exp(b, at_most(b, 89.0f, at_least(b, -30.0f, x)));
  Reg increment = b.vmul(exp_slope(b, reduced.r), reduced.r);
  Reg half = power_of_two(b, b.to_i32(b.vsub(reduced.n, b.splat(1.0f))));
  Reg sum = b.vsub(half, b.splat(0.5f));
  b.fma(sum, increment, half);
  Reg result = b.vadd(sum, sum);
  // Half of the smallest numbers would not be one.
  return b.select(b.less(magnitude(b, x), b.splat(0x1p-30f)), x, result);
}

Reg tanh(Builder& b, Reg x) {
  Reg a = magnitude(b, x);
  // Large: 1 - 2 / (e^2a + 1), which is 1 from a = 9.02 on.
  Reg bounded = at_most(b, 10.0f, a);
  const ExpParts parts = exp_parts(b, b.vadd(bounded, bounded));
  Reg denominator = b.splat(1.0f);
  b.fma(denominator, parts.p, power_of_two(b, b.to_i32(parts.n)));
  Reg quotient = b.vdiv(b.splat(2.0f), denominator);
  Reg large = b.vsub(b.splat(1.0f), quotient);
  // Small: a + a^3 * P(a^2), where the other form cancels.
  Reg s = b.vmul(a, a);
  Reg series = polynomial(b, s,
                          {-0.0060969567857682705f, 0.02099737897515297f, -0.053850963711738586f,
                           0.13332770764827728f, -0.333333283662796f});
  Reg small = b.copy(a);
  b.fma(small, b.vmul(a, s), series);
  Reg result = b.select(b.less(a, b.splat(0.625f)), small, large);
  return with_sign_of(b, x, result);
}

Reg erf(Builder& b, Reg x) {
  Reg a = magnitude(b, x);
  Reg s = b.vmul(a, a);
  // Large: 1 - e^(-a^2) * Q(t), t = 1 / (1 + a / 2). The fit ends at 4.2, where erf is 1 already.
  Reg denominator = b.splat(1.0f);
  b.fma(denominator, at_most(b, 4.2f, a), b.splat(0.5f));
  Reg t = b.vdiv(b.splat(1.0f), denominator);
  Reg q = polynomial(
      b, t,
      {0.11767629534006119f, -0.46546825766563416f, 0.5549188256263733f, -0.0969080999493599f,
       0.34459906816482544f, 0.2605992555618286f, 0.2847695052623749f, -0.00014464042033068836f});
  const ExpParts parts = exp_parts(b, at_least(b, -80.0f, negate(b, s)));
  Reg e = b.vmul(parts.p, power_of_two(b, b.to_i32(parts.n)));
  Reg large = b.splat(1.0f);
  b.fnma(large, e, q);
  // Small: a * P(a^2).
  Reg series = polynomial(
      b, s,
      {7.853860006434843e-05f, -0.0008010195451788604f, 0.005188328213989735f,
       -0.026853812858462334f, 0.1128358542919159f, -0.3761262595653534f, 1.1283791065216064f});
  Reg small = b.vmul(a, series);
  Reg result = b.select(b.less(a, b.splat(1.0f)), small, large);
  return with_sign_of(b, x, result);
}

Reg sigmoid(Builder& b, Reg x) {
  const OnePlusExp denominator = one_plus_exp(b, negate(b, x));
  return b.vdiv(denominator.inverse, denominator.sum);
}

Reg silu(Builder& b, Reg x) { return over_one_plus_exp(b, x, negate(b, x)); }

Reg gelu(Builder& b, Reg x) {
  // gelu(x) = max(x, 0) - a * Phi(-a), a = |x|: one formula for both signs, with nothing to cancel.
  // Phi(-a) = e^(-a^2 / 2) * R(t), t = 1 / (1 + 0.3 a). R was fitted for this file on [0, 14.5]
  // with least relative maximum, 5.8e-8; beyond, the product has underflowed.
  Reg a = at_most(b, 15.0f, magnitude(b, x));
  Reg denominator = b.splat(1.0f);
  b.fma(denominator, a, b.splat(0.3f));
  Reg t = b.vdiv(b.splat(1.0f), denominator);
  Reg series = polynomial(b, t,
                          {0.038407404f, -0.169307515f, 0.228951886f, -0.0768397674f, 0.142765343f,
                           0.0945858359f, 0.121945269f, 0.119484209f, 7.37242999e-06f});
  Reg factor = b.vmul(a, series);

  // The rounding error of a^2 / 2 would be 50 ulp of the result at a = 14: it is carried along.
  Reg half = b.vmul(a, b.splat(0.5f));
  Reg square = b.vmul(half, a);
  Reg error = b.copy(square);
  b.fms(error, half, a);
  const Reduced reduced = reduce_for_exp(b, negate(b, square));
  Reg p = exp_polynomial(b, b.vsub(reduced.r, error));
  // Scaled last, so that a subnormal result is rounded once.
  Reg tail = scale_by_power(b, b.vmul(p, factor), reduced.n);
  return b.vsub(b.vmax(b.zero(), x), tail);
}

Reg gelu_tanh(Builder& b, Reg x) {
  // (1 + tanh u) / 2 = 1 / (1 + e^(-2u)), and 2u = x * (c + d x^2).
  constexpr float kC = 1.59576912160573071f;  // 2 sqrt(2 / pi)
  constexpr float kD = 0.0713548162726009f;   // 0.044715 of it
  Reg inner = b.splat(-kC);
  b.fnma(inner, b.vmul(x, x), b.splat(kD));
  return over_one_plus_exp(b, x, b.vmul(x, inner));
}

Reg sin(Builder& b, Reg x) {
  Reg value = sine_of_quadrant(b, reduce_to_quadrant(b, magnitude(b, x)));
  Reg sign = b.vand(x, b.splat_bits(kSignBit));
  return b.vxor(value, sign);
}

Reg cos(Builder& b, Reg x) {
  Quadrant quadrant = reduce_to_quadrant(b, x);
  quadrant.index = b.iadd(quadrant.index, b.splat_bits(1));
  return sine_of_quadrant(b, quadrant);
}

Reg rsqrt(Builder& b, Reg x) {
  Reg root = b.vsqrt(x);
  return b.vdiv(b.splat(1.0f), root);
}

bool pow_supported(double exponent) {
  return exponent == 2 || exponent == 3 || exponent == 0.5 || exponent == -0.5 || exponent == -1;
}

Reg pow(Builder& b, Reg x, double exponent) {
  assert(pow_supported(exponent));
  if (exponent == 0.5) return b.vsqrt(x);
  if (exponent == -0.5) return rsqrt(b, x);
  if (exponent == -1) return b.vdiv(b.splat(1.0f), x);
  Reg square = b.vmul(x, x);
  return exponent == 2 ? square : b.vmul(square, x);
}

}  // namespace tilewright::jit::math
