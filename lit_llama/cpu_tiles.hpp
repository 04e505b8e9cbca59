// What a prompt takes longest for, its products with the weights and attention, in bf16 by the tiles that some
// processors have (AMX: registers of 16 rows of 64 bytes), 32 rows by 32 columns at once, summed in fp32. What is
// computed for a token does not depend on those that follow it, nor on other rows.
//
// The left side is read as it lies. Of the right side 32 columns are packed: for each 32 of the numbers that are summed
// over two tiles of 16 columns; a tile's rows hold, of each column, two numbers that follow each other.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "cpu_activations.hpp"
#include "cpu_weights.hpp"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr long BLOCK = 32;

struct alignas(64) Line {  // what a row of a tile is loaded from
    char bytes[64];
};

template <class T>
struct Buffer {  // lines of numbers, which are not set to anything
    std::unique_ptr<Line[]> lines;
    explicit Buffer(long count) : lines(new Line[count * sizeof(T) / sizeof(Line)]) {}
    operator T*() const { return (T*)lines.get(); }
};

typedef uint32_t Pair __attribute__((may_alias));  // two numbers of 16 bits

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

// Linux saves tiles, which are large, for those processes only that ask.
bool tiles_permitted() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

struct Tiles {  // a thread's, all 8 of them, for as long as this lives
    Tiles() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t bytes_a_row[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        std::fill_n(shapes.bytes_a_row, 8, 64);
        std::fill_n(shapes.rows, 8, 16);
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

// c (32, 32) = left (32, 32 * steps) times packed columns; strides are in numbers.
void multiply_block(const uint16_t* left, long stride, const uint16_t* packed, long steps, float* c, long c_stride) {
    const uint16_t* lower = left + 16 * stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long step = 0; step < steps; step++, left += BLOCK, lower += BLOCK, packed += BLOCK * BLOCK) {
        for (long row = 0; row < 16; row++) {  // the next step's: rows lie apart, which no processor foresees
            _mm_prefetch((const char*)(left + row * stride + BLOCK), _MM_HINT_T0);
            _mm_prefetch((const char*)(lower + row * stride + BLOCK), _MM_HINT_T0);
        }
        _tile_loadd(4, left, 2 * stride);
        _tile_loadd(6, packed, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, packed + BLOCK * BLOCK / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, lower, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 4 * c_stride);
    _tile_stored(1, c + 16, 4 * c_stride);
    _tile_stored(2, c + 16 * c_stride, 4 * c_stride);
    _tile_stored(3, c + 16 * c_stride + 16, 4 * c_stride);
}

// To bf16, to the nearest; `count` is a multiple of 16.
void round_to(const float* from, long count, uint16_t* to) {
    for (long i = 0; i < count; i += 16)
        _mm256_storeu_si256((__m256i*)(to + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
}

#else  // nothing below is called

bool tiles_permitted() { return false; }
struct Tiles {};
void multiply_block(const uint16_t*, long, const uint16_t*, long, float*, long) {}
void round_to(const float*, long, uint16_t*) {}

#endif

// Packs twice 16 columns that lie in rows of memory, `length` numbers each.
void pack_columns(const uint16_t* first, const uint16_t* second, long stride, long length, uint16_t* to) {
    for (long at = 0; at < length; at += BLOCK)
        for (const uint16_t* columns : {first + at, second + at}) {
            for (long pair = 0; pair < 16; pair++)
                for (long column = 0; column < 16; column++)
                    ((Pair*)to)[16 * pair + column] = *(const Pair*)(columns + column * stride + 2 * pair);
            to += BLOCK * BLOCK / 2;
        }
}

// Packs 32 columns that lie side by side, 32 numbers each.
void pack_rows(const uint16_t* rows, long stride, uint16_t* to) {
    for (long half = 0; half < 2; half++)
        for (long row = 0; row < BLOCK; row++)
            for (long column = 0; column < 16; column++)
                to[(16 * half + row / 2) * 32 + 2 * column + row % 2] = rows[row * stride + 16 * half + column];
}

// 32 rows, of which `count` are there: in place if all, else in `room`, zeros after them.
const uint16_t* whole_block(const uint16_t* rows, long count, long width, uint16_t* room) {
    if (count >= BLOCK) return rows;
    std::copy_n(rows, count * width, room);
    std::fill(room + count * width, room + BLOCK * width, 0);
    return room;
}

// 16 rows of a matrix in bf16: in place, or in `room` if they are quantized.
const uint16_t* dense_rows(const Matrix& m, long first, uint16_t* room) {
    if (m.kind == BF16) return (const uint16_t*)m.weight + first * m.in;
    for (long i = 0; i < 16; i++) unpack_row(m, first + i, room + i * m.in);
    return room;
}

// to (tokens, out) = x (tokens, in) times a matrix in bf16 or quantized whose sizes are multiples of 32; or, with `up`,
// silu of that times x times `up`.
void multiply_tiled(const Matrix& m, const Matrix* up, long tokens, const uint16_t* x, uint16_t* to, int threads) {
    long last = (tokens - 1) / BLOCK * BLOCK, width = up ? BLOCK / 2 : BLOCK;
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Buffer<uint16_t> room(BLOCK * m.in), packed(BLOCK * m.in), dense(BLOCK * m.in);
        const uint16_t* rest = whole_block(x + last * m.in, tokens - last, m.in, room);
        alignas(64) float c[BLOCK * BLOCK];
#pragma omp for schedule(dynamic, BLOCK / width)  // a line of `to` is written by one thread
        for (long j = 0; j < m.out; j += width) {  // with `up`, 16 columns of each side by side
            const uint16_t* first = dense_rows(m, j, dense);
            const uint16_t* second = dense_rows(up ? *up : m, up ? j : j + 16, dense + 16 * m.in);
            pack_columns(first, second, m.in, m.in, packed);
            for (long t = 0; t < tokens; t += BLOCK) {
                for (long row = 0; row < std::min(BLOCK, tokens - t); row++)
                    __builtin_prefetch(to + (t + row) * m.out + j, 1);  // to write: these lie apart as well
                const uint16_t* left = t == last ? rest : x + t * m.in;
                multiply_block(left, m.in, packed, m.in / BLOCK, c, BLOCK);
                for (long row = 0; row < std::min(BLOCK, tokens - t); row++) {
                    float* own = c + row * BLOCK;
                    if (up)
                        for (long i = 0; i < 16; i++) own[i] = silu(own[i]) * own[16 + i];
                    round_to(own, width, to + (t + row) * m.out + j);
                }
            }
        }
    }
}

// e^(score / sqrt(d)) of the first `count` scores over that of the largest, then zeros; returns 1 over their sum.
float exponentials(float* scores, long count, long length, long d, uint16_t* to) {
    float largest = -3e38f, total = 0, scale = LOG2_E / std::sqrt(float(d));
    std::fill(scores + count, scores + length, -3e38f);  // whole vectors: nothing is left to do one by one
    for (long i = 0; i < length; i++) largest = std::max(largest, scores[i]);
    for (long i = 0; i < length; i++) {
        float share = power_of_two(scale * scores[i] - scale * largest);
        total += share;
        store(share, to[i]);
    }
    std::fill(to + count, to + length, 0);
    return 1 / total;
}

struct Attention {
    long heads, kv_heads, head_dim;  // the last a multiple of 32
    long length, stride, capacity;   // of a head: tokens, numbers from its queries to the next's, columns of the cache
};

// Causal attention of a prompt to itself: queries (heads, length, d), keys and values (kv_heads, capacity, d), mixed
// (length, heads, d).
void attend_tiled(const Attention& a, const uint16_t* queries, const uint16_t* keys, const uint16_t* values,
                  uint16_t* mixed, int threads) {
    long d = a.head_dim, length = a.length, blocks = (length + BLOCK - 1) / BLOCK, size = BLOCK * BLOCK;
    long numbers = a.kv_heads * blocks * BLOCK * d;
    Buffer<uint16_t> packed_keys(numbers), packed_values(numbers);
    // Of a head's keys block after block; of its values 32 dimensions after the others, each block after block.
    auto keys_of = [&](long kv_head, long block) { return packed_keys + (kv_head * blocks + block) * BLOCK * d; };
    auto values_of = [&](long kv_head, long block, long at) {
        return packed_values + ((kv_head * d + at) / BLOCK * blocks + block) * size;
    };
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Buffer<uint16_t> room(BLOCK * d), shares(blocks * size);
        Buffer<float> scores(blocks * size);
        alignas(64) float c[BLOCK * BLOCK];
#pragma omp for schedule(dynamic)
        for (long piece = 0; piece < a.kv_heads * blocks; piece++) {
            long kv_head = piece / blocks, block = piece % blocks, start = block * BLOCK;
            long place = (kv_head * a.capacity + start) * d;
            const uint16_t* rows = whole_block(keys + place, length - start, d, room);
            pack_columns(rows, rows + 16 * d, d, d, keys_of(kv_head, block));
            rows = whole_block(values + place, length - start, d, room);
            for (long at = 0; at < d; at += BLOCK) pack_rows(rows + at, d, values_of(kv_head, block, at));
        }
#pragma omp for schedule(dynamic)
        for (long piece = 0; piece < a.heads * blocks; piece++) {
            // The last queries, which see most, first, so that no thread is left with much.
            long head = piece % a.heads, block = blocks - 1 - piece / a.heads, kv_head = head * a.kv_heads / a.heads;
            long start = block * BLOCK, count = std::min(BLOCK, length - start), seen = start + BLOCK;
            const uint16_t* own = whole_block(queries + head * a.stride + start * d, count, d, room);
            for (long other = 0; other <= block; other++)
                multiply_block(own, d, keys_of(kv_head, other), d / BLOCK, scores + other * BLOCK, seen);
            float factors[BLOCK];
            for (long row = 0; row < count; row++)
                factors[row] = exponentials(scores + row * seen, start + row + 1, seen, d,
                                            shares + row * seen);
            for (long at = 0; at < d; at += BLOCK) {
                multiply_block(shares, seen, values_of(kv_head, 0, at), block + 1, c, BLOCK);
                for (long row = 0; row < count; row++) {
                    for (long i = 0; i < BLOCK; i++) c[row * BLOCK + i] *= factors[row];
                    round_to(c + row * BLOCK, BLOCK, mixed + ((start + row) * a.heads + head) * d + at);
                }
            }
        }
    }
}

}  // namespace
