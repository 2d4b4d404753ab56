// The exponential of a softmax whose maximum is known.
#pragma once
#include "../simd.h"

namespace {

// e^x for x <= 0: -inf and all below the smallest normal number give 0, NaN stays NaN.
INLINE vf weight(vf x) {
  const vf e = vexp(vmin(vmax(x, splat(exp_low)), splat(0.f)));
  return x < splat(exp_low) ? splat(0.f) : x == x ? e : x;
}

}  // namespace
