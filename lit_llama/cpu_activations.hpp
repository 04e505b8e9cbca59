// Functions of one number, in forms that the compiler can do for many at once.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// e^x within 2 units of the last place: 2^n 2^f with |f| <= 1/2.
inline float exponential(float x) {
    float t = std::max(x, -87.0f) * 1.44269504f, n = std::rint(t), f = (t - n) * 0.69314718f;
    float series = 1 + f * (1 + f * (1 / 2.0f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f / 720.0f)))));
    int32_t bits = (int32_t(n) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return series * power;
}

inline float silu(float x) { return x / (1 + exponential(std::min(-x, 87.0f))); }

}  // namespace
