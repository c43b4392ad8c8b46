// Transcendental functions as VIR: what exp, tanh, gelu ... mean in a kernel.
//
// Each function appends instructions for one vector and returns a new register; its argument is not
// changed. All are free of branches and tables: range reduction, a polynomial, a scale. The errors
// below are against the exact value, measured over dense samples (math_test; 1 ulp = distance to
// the next float). NaN gives NaN everywhere. Subnormal results are rounded, not flushed.
//
//   exp, exp2, log                 1 ulp
//   log1p                          2 ulp
//   expm1                          4 ulp
//   sigmoid, silu, tanh, rsqrt     2 ulp
//   erf                            4 ulp
//   gelu                           7 ulp everywhere; 4 ulp or 2^-23 absolute
//   gelu_tanh                      4 ulp or 2^-22 absolute (the argument of its exp is rounded, as
//   in
//                                  ATen)
//   sin, cos                       2 ulp for |x| <= 1e6; beyond, some value in [-1, 1]; NaN for an
//                                  infinity
//
// At infinities each gives its limit: silu(-inf) and gelu(-inf) are 0, where ATen computes NaN.
//
// Tested by math_test.
#pragma once

#include "jit/vir/builder.h"

namespace tilewright::jit::math {

using vir::Builder;
using vir::Reg;

Reg exp(Builder& b, Reg x);
// For x <= 0 (of a softmax): what is below 2^-126 may be zero, which saves a scaling with AVX2.
Reg exp_to_one(Builder& b, Reg x);
Reg exp2(Builder& b, Reg x);
Reg log(Builder& b, Reg x);
Reg log1p(Builder& b, Reg x);  // log(1 + x)
Reg expm1(Builder& b, Reg x);  // e^x - 1
Reg tanh(Builder& b, Reg x);
Reg erf(Builder& b, Reg x);
Reg sigmoid(Builder& b, Reg x);
Reg silu(Builder& b, Reg x);       // x * sigmoid(x)
Reg gelu(Builder& b, Reg x);       // x * Phi(x), the erf form
Reg gelu_tanh(Builder& b, Reg x);  // the tanh form
Reg sin(Builder& b, Reg x);
Reg cos(Builder& b, Reg x);
Reg rsqrt(Builder& b, Reg x);  // 1 / sqrt(x), both steps correctly rounded

// The exponents that pow() knows: 2, 3, 0.5, -0.5, -1.
bool pow_supported(double exponent);
// x to a constant exponent, computed as ATen does. REQUIRES: pow_supported(exponent)
Reg pow(Builder& b, Reg x, double exponent);

}  // namespace tilewright::jit::math
