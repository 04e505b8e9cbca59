// What a prompt takes longest for, its products with the weights and attention, in bf16 by the tiles that some
// processors have (AMX: registers of 16 rows of 64 bytes), 32 rows by 32 columns at once, summed in fp32. What is
// computed for a token does not depend on those that follow it, nor on other rows.
//
// The left side is read as it lies. Of the right side 32 columns are packed: for each 32 of the numbers that are summed
// over two tiles of 16 columns; a tile's rows hold, of each column, two numbers that follow each other.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_activations.hpp"
#include "cpu_weights.hpp"
#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct alignas(64) Line {  // what a row of a tile is loaded from
    char bytes[64];
};

template <class T>
struct Buffer {  // lines of numbers, which are not set to anything
    std::unique_ptr<Line[]> lines;
    explicit Buffer(long count) : lines(new Line[count * sizeof(T) / sizeof(Line)]) {}
    operator T*() const { return (T*)lines.get(); }
};

struct Update {  // what an adapter adds to a product: B (A x)
    // A x (tokens, r), zero for tokens of others and up to a whole block of 32; (out, r), null: nothing.
    const uint16_t *low, *first_B, *second_B;
    long r;                    // a multiple of 32
    std::vector<bool> blocks;  // whether any of 32 tokens is its own
};

struct Product {  // to (tokens, out) = x times a matrix in bf16 or quantized
    const Matrix *matrix, *up;  // not null: silu of that times x times `up`
    uint16_t* to;
    std::vector<Update> updates = {};  // of the matrix by first_B; by second_B of `up`, or of the matrix as well
};

struct Attention {  // causal, of some tokens of a row to itself and what comes before it
    const uint16_t* queries;         // (heads, stride / d, d), of which there are `length` each
    const uint16_t *keys, *values;   // (kv_heads, capacity, d), in the order of the tokens from the first column on
    uint16_t* mixed;                 // (length, heads, d)
    long before, length;             // tokens: whose keys there are only, and whose queries as well
    long stride, capacity;
    long heads, kv_heads, head_dim;  // the last, d, is a multiple of 32

    const uint16_t* head(const uint16_t* tensor, long kv_head) const { return tensor + kv_head * capacity * head_dim; }
};

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

constexpr long BLOCK = 32;

// Linux saves tiles, which are large, for those processes only that ask.
bool tiles_permitted() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

struct Tiles {  // a thread's, all 8 of them, for as long as this lives
    Tiles() {
        static const struct {  // in memory, whole: compilers think that only its first bytes are read
            uint8_t palette, start_row, reserved[14];
            uint16_t bytes_a_row[16];
            uint8_t rows[16];
        } shapes = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_loadconfig(&shapes);
    }
    ~Tiles() { _tile_release(); }
};

void clear_block() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Adds left (32, 32 * steps), whose stride is in numbers, times packed columns. `meanwhile` is called back at each
// step: other work fits between that of the tiles if it comes in small pieces.
template <class Meanwhile>
void add_to_block(const uint16_t* left, long stride, const uint16_t* packed, long steps, Meanwhile meanwhile) {
    asm volatile("" ::: "memory");  // compilers do not know that tiles read memory
    for (long step = 0; step < steps; step++, left += BLOCK, packed += BLOCK * BLOCK) {
        meanwhile(step);
        _tile_loadd(4, left, 2 * stride);
        _tile_loadd(6, packed, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, packed + BLOCK * BLOCK / 2, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + 16 * stride, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
}

void store_block(float* c, long stride) {
    _tile_stored(0, c, 4 * stride);
    _tile_stored(1, c + 16, 4 * stride);
    _tile_stored(2, c + 16 * stride, 4 * stride);
    _tile_stored(3, c + 16 * stride + 16, 4 * stride);
}

void multiply_block(const uint16_t* left, long stride, const uint16_t* packed, long steps, float* c, long c_stride) {
    clear_block();
    add_to_block(left, stride, packed, steps, [](long) {});
    store_block(c, c_stride);
}

// 16 or 32 numbers to bf16, to the nearest.
void round_to(__m512 numbers, uint16_t* to) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(numbers));
}
void round_to(__m512 first, __m512 second, uint16_t* to) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// 2^x: 2^n 2^f with |f| <= 1/2, the latter by the polynomial of degree 4 that is nearest to it, within 2.6e-6 of it.
__m512 power_of_two(__m512 x) {
    __m512 n = _mm512_roundscale_ps(x, 8), f = _mm512_sub_ps(x, n), power = _mm512_set1_ps(9.5700864e-3f);
    for (float next : {5.5917900e-2f, 2.4024746e-1f, 6.9312179e-1f, 9.9999928e-1f})
        power = _mm512_fmadd_ps(power, f, _mm512_set1_ps(next));
    return _mm512_scalef_ps(power, n);
}

// x / (1 + e^-x); the division by a reciprocal of 14 bits, made twice as many by a step of Newton's.
__m512 silu(__m512 x) {
    __m512 power = _mm512_min_ps(_mm512_mul_ps(x, _mm512_set1_ps(-LOG2_E)), _mm512_set1_ps(126));
    __m512 divisor = _mm512_add_ps(power_of_two(power), _mm512_set1_ps(1)), part = _mm512_rcp14_ps(divisor);
    return _mm512_mul_ps(x, _mm512_mul_ps(part, _mm512_fnmadd_ps(divisor, part, _mm512_set1_ps(2))));
}

// Packs twice 16 columns that lie in rows of memory, `length` numbers each: pairs of numbers are transposed, 16 by 16.
void pack_columns(const uint16_t* first, const uint16_t* second, long stride, long length, uint16_t* to) {
    // Numbered by row and column, each four bits, four turns of all eight bits to the left exchange the two. One is
    // to interleave each row of the upper half with its own of the lower.
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (long at = 0; at < length; at += BLOCK)
        for (const uint16_t* columns : {first + at, second + at}) {
            __m512i rows[16], turned[16];
            for (long i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(columns + i * stride);
            for (long turn = 0; turn < 4; turn++) {
                for (long i = 0; i < 8; i++) {
                    turned[2 * i] = _mm512_permutex2var_epi32(rows[i], low, rows[i + 8]);
                    turned[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], high, rows[i + 8]);
                }
                std::copy_n(turned, 16, rows);
            }
            for (long i = 0; i < 16; i++, to += BLOCK) _mm512_store_si512(to, rows[i]);
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

// Asks for a part of 16 rows of a matrix, which then are near when they are needed.
void ask_for_rows(const Matrix& m, long first, long part, long parts) {
    long bytes = 16 * m.in * (m.kind == BF16 ? 4 : m.kind == INT8 ? 2 : 1) / 2;
    const char* rows = (const char*)m.weight + first / 16 * bytes;
    for (long line = part * bytes / parts / 64; line < (part + 1) * bytes / parts / 64; line++)
        _mm_prefetch(rows + 64 * line, _MM_HINT_T1);
}

struct Columns {  // 32 of a product from j on; of one with `up` 16 of each matrix, which then lie side by side
    const Product* product;
    long j;
    const Matrix& left() const { return *product->matrix; }
    const Matrix& right() const { return product->up ? *product->up : *product->matrix; }
    long right_j() const { return product->up ? j : j + 16; }
};

constexpr long NEAR = 800 * 1024;  // numbers of tokens that stay in the second cache while weights pass

// Some products of one x (tokens, in), with matrices whose sizes are multiples of 32.
void multiply_tiled(const std::vector<Product>& products, long tokens, const uint16_t* x, int threads) {
    long in = products[0].matrix->in, steps = in / BLOCK, rows_a_step = (BLOCK + steps - 1) / steps;
    long last = (tokens - 1) / BLOCK * BLOCK, blocks = last / BLOCK + 1, outputs = 0;
    long ranks = 0;  // of the product that has most of them
    for (const Product& product : products) {
        outputs += product.matrix->out;
        long own = 0;
        for (const Update& update : product.updates) own += update.r;
        ranks = std::max(ranks, own);
    }
    long parts = (blocks * BLOCK * in + NEAR - 1) / NEAR;
    long part = std::max((blocks + parts - 1) / parts, 8L) * BLOCK;
    long items = (tokens + part - 1) / part * (outputs / BLOCK);
    std::atomic<long> taken{0};
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Buffer<uint16_t> room(BLOCK * in), packed(BLOCK * in), dense(BLOCK * in);
        Buffer<uint16_t> packed_updates(BLOCK * ranks), nothing(16 * ranks);
        std::fill_n((uint16_t*)nothing, 16 * ranks, 0);
        const uint16_t* rest = whole_block(x + last * in, tokens - last, in, room);
        alignas(64) float results[2][BLOCK * BLOCK];
        auto multiply = [&](const Columns& own, const Columns* next, long start, long end) {
            const Product& product = *own.product;
            long out = product.matrix->out;
            auto finish = [&](const float* row, long token) {
                __m512 first = _mm512_load_ps(row), second = _mm512_load_ps(row + 16);
                uint16_t* at = product.to + token * out + own.j;
                if (product.up) round_to(silu(first) * second, at);
                else round_to(first, second, at);
            };
            const uint16_t* lower = dense_rows(own.left(), own.j, dense);
            pack_columns(lower, dense_rows(own.right(), own.right_j(), dense + 16 * in), in, in, packed);
            uint16_t* to = packed_updates;
            for (const Update& update : product.updates) {
                const uint16_t* first = update.first_B ? update.first_B + own.j * update.r : nothing;
                const uint16_t* second = update.second_B ? update.second_B + own.right_j() * update.r : nothing;
                pack_columns(first, second, update.r, update.r, to);
                to += BLOCK * update.r;
            }
            const float* done = nullptr;
            for (long t = start; t < end; t += BLOCK) {
                if (next) {
                    ask_for_rows(next->left(), next->j, (t - start) / BLOCK, part / BLOCK);
                    ask_for_rows(next->right(), next->right_j(), (t - start) / BLOCK, part / BLOCK);
                }
                float* c = results[t / BLOCK % 2];
                const uint16_t* left = t == last ? rest : x + t * in;
                clear_block();
                add_to_block(left, in, packed, steps, [&](long step) {
                    for (long row = 0; row < BLOCK; row++)  // the next step's, which no processor foresees
                        _mm_prefetch((const char*)(left + row * in + (step + 1) * BLOCK), _MM_HINT_T0);
                    if (!done) return;
                    for (long row = step * rows_a_step; row < std::min(BLOCK, (step + 1) * rows_a_step); row++)
                        finish(done + row * BLOCK, t - BLOCK + row);
                });
                const uint16_t* B = packed_updates;
                for (const Update& update : product.updates) {
                    if (update.blocks[t / BLOCK])
                        add_to_block(update.low + t * update.r, update.r, B, update.r / BLOCK, [](long) {});
                    B += BLOCK * update.r;
                }
                store_block(c, BLOCK);
                done = c;
            }
            long block = (end - 1) / BLOCK * BLOCK;
            for (long t = block; t < end; t++) finish(done + (t - block) * BLOCK, t);
        };
        // 32 columns of results: a line of memory is written by one thread.
        auto columns_of = [&](long item) {
            long j = item % (outputs / BLOCK) * BLOCK;
            const Product* product = products.data();
            for (; j >= product->matrix->out; product++) j -= product->matrix->out;
            return Columns{product, j};
        };
        for (long item = taken++, next; item < items; item = next) {
            next = taken++;
            long start = item / (outputs / BLOCK) * part, end = std::min(tokens, start + part);
            Columns own = columns_of(item), following = columns_of(next);
            if (own.product->up) {
                Columns half{own.product, own.j + 16};
                multiply(own, &half, start, end);
                own = half;
            }
            multiply(own, next < items ? &following : nullptr, start, end);
        }
    }
}

// e^(score / sqrt(d)) of the first `count` scores over that of the largest, then zeros; returns 1 over their sum. There
// is place for `length` of them, a multiple of 32.
float exponentials(float* scores, long count, long length, long d, uint16_t* to) {
    std::fill(scores + count, scores + length, -3e38f);
    __m512 largest = _mm512_set1_ps(-3e38f), total = _mm512_setzero_ps();
    for (long i = 0; i < length; i += 16) largest = _mm512_max_ps(largest, _mm512_load_ps(scores + i));
    __m512 scale = _mm512_set1_ps(LOG2_E / std::sqrt(float(d)));
    __m512 most = scale * _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (long i = 0; i < length; i += BLOCK) {
        __m512 first = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + i), scale, most));
        __m512 second = power_of_two(_mm512_fmsub_ps(_mm512_load_ps(scores + i + 16), scale, most));
        total += first + second;
        round_to(first, second, to + i);
    }
    return 1 / _mm512_reduce_add_ps(total);
}

struct Piece {  // of attention: a block of 32 keys, or queries, of a head
    const Attention* row;
    long head, block;
    long packed;  // where the row's blocks of keys and values begin
    long seen() const { return std::min(row->before + (block + 1) * BLOCK, row->before + row->length); }
};

void attend_tiled(const std::vector<Attention>& rows, int threads) {
    long d = rows[0].head_dim, size = BLOCK * BLOCK, packed = 0, most = 0;
    std::vector<Piece> to_pack, to_attend;
    auto blocks_of = [](long tokens) { return (tokens + BLOCK - 1) / BLOCK; };
    for (const Attention& row : rows) {
        long blocks = blocks_of(row.before + row.length);
        for (long head = 0; head < row.kv_heads; head++)
            for (long block = 0; block < blocks; block++) to_pack.push_back({&row, head, block, packed});
        for (long head = 0; head < row.heads; head++)
            for (long block = 0; block < blocks_of(row.length); block++)
                to_attend.push_back({&row, head, block, packed});
        packed += row.kv_heads * blocks;
        most = std::max(most, blocks);
    }
    // The queries that see most first, so that no thread is left with much.
    std::stable_sort(to_attend.begin(), to_attend.end(), [](auto& a, auto& b) { return a.seen() > b.seen(); });
    Buffer<uint16_t> packed_keys(packed * BLOCK * d), packed_values(packed * BLOCK * d);
    // Of a head's keys block after block; of its values 32 dimensions after the others, each block after block.
    auto keys_of = [&](const Piece& piece, long kv_head, long block) {
        long blocks = blocks_of(piece.row->before + piece.row->length);
        return packed_keys + (piece.packed + kv_head * blocks + block) * BLOCK * d;
    };
    auto values_of = [&](const Piece& piece, long kv_head, long block, long at) {
        long blocks = blocks_of(piece.row->before + piece.row->length);
        return packed_values + (piece.packed + kv_head * blocks) * BLOCK * d + (at / BLOCK * blocks + block) * size;
    };
#pragma omp parallel num_threads(threads)
    {
        Tiles tiles;
        Buffer<uint16_t> room(BLOCK * d), shares(most * size);
        Buffer<float> scores(most * size);
        alignas(64) float c[BLOCK * BLOCK];
#pragma omp for schedule(dynamic)
        for (long i = 0; i < (long)to_pack.size(); i++) {
            const Piece& piece = to_pack[i];
            const Attention& row = *piece.row;
            long start = piece.block * BLOCK, count = row.before + row.length - start;
            const uint16_t* keys = whole_block(row.head(row.keys, piece.head) + start * d, count, d, room);
            pack_columns(keys, keys + 16 * d, d, d, keys_of(piece, piece.head, piece.block));
            const uint16_t* values = whole_block(row.head(row.values, piece.head) + start * d, count, d, room);
            for (long at = 0; at < d; at += BLOCK)
                pack_rows(values + at, d, values_of(piece, piece.head, piece.block, at));
        }
#pragma omp for schedule(dynamic)
        for (long i = 0; i < (long)to_attend.size(); i++) {
            const Piece& piece = to_attend[i];
            const Attention& row = *piece.row;
            long kv_head = piece.head * row.kv_heads / row.heads, blocks = blocks_of(piece.seen());
            long start = piece.block * BLOCK, count = std::min(BLOCK, row.length - start), seen = blocks * BLOCK;
            const uint16_t* own = whole_block(row.queries + piece.head * row.stride + start * d, count, d, room);
            for (long other = 0; other < blocks; other++) {
                const uint16_t* keys = keys_of(piece, kv_head, other);
                multiply_block(own, d, keys, d / BLOCK, scores + other * BLOCK, seen);
            }
            __m512 factors[BLOCK];
            for (long t = 0; t < count; t++)
                factors[t] = _mm512_set1_ps(
                    exponentials(scores + t * seen, row.before + start + t + 1, seen, d, shares + t * seen));
            for (long at = 0; at < d; at += BLOCK) {
                multiply_block(shares, seen, values_of(piece, kv_head, 0, at), blocks, c, BLOCK);
                for (long t = 0; t < count; t++)
                    round_to(_mm512_load_ps(c + t * BLOCK) * factors[t],
                             _mm512_load_ps(c + t * BLOCK + 16) * factors[t],
                             row.mixed + ((start + t) * row.heads + piece.head) * d + at);
            }
        }
    }
}

#else

bool tiles_permitted() { return false; }  // and nothing below is called
void multiply_tiled(const std::vector<Product>&, long, const uint16_t*, int) {}
void attend_tiled(const std::vector<Attention>&, int) {}

#endif

}  // namespace
