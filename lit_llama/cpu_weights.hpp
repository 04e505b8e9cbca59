// Rows of weights as they are stored, in a product with a vector or made dense: fp32, bf16, int8 with a scale a row, and
// 4 bits, each the number of one of 16 levels, with a scale and perhaps a minimum a group.
//
// How those of 4 bits are looked up is said here in a processor's own instructions, where it has them for it.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

extern "C" {

enum Kind : int64_t { FP32, BF16, INT8, FOUR_BITS };

struct Matrix {  // (out, in), rows one after the other
    int64_t kind, out, in;
    const void* weight;
    const void* scales;  // of int8 fp32, one a row; of 4 bits one a group
    // Of 4 bits:
    const void* minima;   // null: nothing is added
    const float* levels;  // 16
    int64_t group, bf16;  // bf16: scales and minima, else fp32
};

}  // extern "C"

namespace {

inline float value(float v) { return v; }
inline float value(int8_t v) { return v; }
inline float value(uint16_t bits) {  // bf16, the upper half of fp32
    uint32_t word = uint32_t(bits) << 16;
    float v;
    memcpy(&v, &word, sizeof v);
    return v;
}

inline void store(float v, float& to) { to = v; }
inline void store(float v, uint16_t& to) {  // to the nearest, halfway to even
    uint32_t word;
    memcpy(&word, &v, sizeof word);
    to = (word + 0x7FFF + ((word >> 16) & 1)) >> 16;
}

template <class T>
float dot(const T* a, const float* b, long n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += value(a[i]) * b[i];
    return sum;
}

constexpr long CHUNK = 32;  // weights of 4 bits that are looked up together; groups are multiples of it

// The product of a row of weights of 4 bits with x, which is `arranged`: levels[code] * scale (+ minimum) of its group.
template <class T>
float dot(const uint8_t* codes, const float* levels, const T* scales, const T* minima, long group, const float* x,
          long n) {
#if defined(__AVX512F__)
    __m512 even = _mm512_setzero_ps(), odd = even;
    const __m512 sixteen = _mm512_loadu_ps(levels);
    for (long g = 0; g < n / group; g++) {
        const __m512 minimum = _mm512_set1_ps(minima ? value(minima[g]) : 0);
        const __m512 table = _mm512_fmadd_ps(sixteen, _mm512_set1_ps(value(scales[g])), minimum);
        for (const float* end = x + group; x < end; x += CHUNK, codes += CHUNK / 2) {
            // The look-up takes the lower four bits of each number.
            const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
            const __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
            even = _mm512_fmadd_ps(first, _mm512_loadu_ps(x), even);
            odd = _mm512_fmadd_ps(_mm512_permutexvar_ps(pairs, table), _mm512_loadu_ps(x + CHUNK / 2), odd);
        }
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
#elif defined(__AVX2__) && defined(__FMA__)
    __m256 even = _mm256_setzero_ps(), odd = even;
    for (long g = 0; g < n / group; g++) {
        const __m256 minimum = _mm256_set1_ps(minima ? value(minima[g]) : 0), scale = _mm256_set1_ps(value(scales[g]));
        const __m256 lower = _mm256_fmadd_ps(_mm256_loadu_ps(levels), scale, minimum);
        const __m256 upper = _mm256_fmadd_ps(_mm256_loadu_ps(levels + 8), scale, minimum);
        // Looked up by the lower three bits in both halves of the table; the fourth, as a sign, says which it was.
        auto look_up = [&](__m256i code) {
            const __m256 low = _mm256_permutevar8x32_ps(lower, code), high = _mm256_permutevar8x32_ps(upper, code);
            return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        };
        for (const float* end = x + group; x < end; x += CHUNK, codes += CHUNK / 2)
            for (long i = 0; i < CHUNK / 2; i += 8) {
                const __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i)));
                even = _mm256_fmadd_ps(look_up(_mm256_srli_epi32(pairs, 4)), _mm256_loadu_ps(x + i), even);
                odd = _mm256_fmadd_ps(look_up(pairs), _mm256_loadu_ps(x + CHUNK / 2 + i), odd);
            }
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_add_ps(even, odd));
    return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
#else
    float sum = 0;
    for (long g = 0; g < n / group; g++) {
        float table[16], minimum = minima ? value(minima[g]) : 0;
        for (long i = 0; i < 16; i++) table[i] = levels[i] * value(scales[g]) + minimum;
        for (const float* end = x + group; x < end; x += CHUNK, codes += CHUNK / 2)
            for (long i = 0; i < CHUNK / 2; i++)
                sum += table[codes[i] >> 4] * x[i] + table[codes[i] & 15] * x[CHUNK / 2 + i];
    }
    return sum;
#endif
}

// Of each chunk, the numbers of even places and then those of odd ones, as they lie in the halves of bytes.
inline void arrange(const float* x, long n, float* to) {
    for (long start = 0; start < n; start += CHUNK)
        for (long i = 0; i < CHUNK / 2; i++) {
            to[start + i] = x[start + 2 * i];
            to[start + CHUNK / 2 + i] = x[start + 2 * i + 1];
        }
}

template <class T>
float four_bits_dot(const Matrix& m, long row, const float* arranged) {
    const T *scales = (const T*)m.scales + row * (m.in / m.group), *minima = nullptr;
    if (m.minima) minima = (const T*)m.minima + row * (m.in / m.group);
    return dot((const uint8_t*)m.weight + row * m.in / 2, m.levels, scales, minima, m.group, arranged, m.in);
}

// x, for a matrix of 4 bits arranged, by one row.
float row_dot(const Matrix& m, long row, const float* x) {
    long at = row * m.in;
    if (m.kind == FP32) return dot((const float*)m.weight + at, x, m.in);
    if (m.kind == BF16) return dot((const uint16_t*)m.weight + at, x, m.in);
    if (m.kind == INT8) return dot((const int8_t*)m.weight + at, x, m.in) * ((const float*)m.scales)[row];
    return m.bf16 ? four_bits_dot<uint16_t>(m, row, x) : four_bits_dot<float>(m, row, x);
}

template <class T>
void unpack_int8(const int8_t* codes, float scale, long n, T* to) {
    for (long i = 0; i < n; i++) store(codes[i] * scale, to[i]);
}

// A group of codes by a table of their values, in the order in which they lie.
template <class T>
void look_up(const T* table, const uint8_t* codes, long group, T* to) {
    for (long i = 0; i < group / 2; i++) {
        to[2 * i] = table[codes[i] >> 4];
        to[2 * i + 1] = table[codes[i] & 15];
    }
}

#if defined(__AVX512BW__)
void look_up(const uint16_t* table, const uint8_t* codes, long group, uint16_t* to) {
    const __m512i values = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)table));
    for (long i = 0; i < group / 2; i += 16) {  // of each byte the first code below the second, in 16 bits each
        const __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
        const __m512i second = _mm512_slli_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(15)), 16);
        const __m512i places = _mm512_or_si512(_mm512_srli_epi32(pairs, 4), second);
        _mm512_storeu_si512(to + 2 * i, _mm512_permutexvar_epi16(places, values));
    }
}
#endif

template <class Scale, class T>
void unpack_four_bits(const Matrix& m, long row, T* to) {
    const uint8_t* codes = (const uint8_t*)m.weight + row * m.in / 2;
    for (long g = row * (m.in / m.group), end = g + m.in / m.group; g < end; g++, codes += m.group / 2, to += m.group) {
        T table[16];
        float scale = value(((const Scale*)m.scales)[g]), minimum = m.minima ? value(((const Scale*)m.minima)[g]) : 0;
        for (long i = 0; i < 16; i++) store(m.levels[i] * scale + minimum, table[i]);
        look_up(table, codes, m.group, to);
    }
}

// A row of a quantized matrix, dense.
template <class T>
void unpack_row(const Matrix& m, long row, T* to) {
    if (m.kind == INT8) unpack_int8((const int8_t*)m.weight + row * m.in, ((const float*)m.scales)[row], m.in, to);
    else if (m.bf16) unpack_four_bits<uint16_t>(m, row, to);
    else unpack_four_bits<float>(m, row, to);
}

}  // namespace
