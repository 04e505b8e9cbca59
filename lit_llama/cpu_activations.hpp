// Functions of one number, in forms that the compiler can do for many at once.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// 2^x: 2^n 2^f with |f| <= 1/2, the latter by its Taylor series, the former into the exponent.
inline float power_of_two(float x) {
    x = std::max(x, -126.0f);
    float n = std::rint(x), f = x - n;
    float series = 1.54035304e-4f;
    for (float next : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
        series = series * f + next;
    int32_t bits;
    memcpy(&bits, &series, sizeof bits);
    bits += int32_t(n) << 23;
    memcpy(&series, &bits, sizeof bits);
    return series;
}

constexpr float LOG2_E = 1.44269504f;

inline float exponential(float x) { return power_of_two(x * LOG2_E); }

inline float silu(float x) { return x / (1 + exponential(std::min(-x, 87.0f))); }

}  // namespace
