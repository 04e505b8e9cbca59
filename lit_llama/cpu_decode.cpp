// A Llama on a CPU: a few tokens of a few rows at once with every weight read once, where it lies; and prompts, by
// `cpu_tiles.hpp` as a whole, or what lies between the matrix products, for which it makes quantized weights dense.
//
// Plain loops, which the compiler turns into vector instructions, and no library. Residuals and activations are fp32,
// weights any of `cpu_weights.hpp`, keys and values all of these but 4 bits. What is computed for a row does not depend
// on the rows beside it. `cpu_decode.py` compiles this file and calls it.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <thread>
#include <vector>

#include "cpu_activations.hpp"
#include "cpu_tiles.hpp"
#include "cpu_weights.hpp"

namespace {

constexpr long PIECE = 1 << 16;  // weights, some microseconds of work

}  // namespace

extern "C" {

struct LowRank {  // what an adapter adds to a matrix: B A x
    int64_t r;     // 0: nothing
    const float *A, *B;  // (r, in), (out, r)
};

enum Slot { Q, K, V, O, GATE, UP, DOWN, SLOTS };

struct Shape {
    int64_t layers, hidden, intermediate, heads, kv_heads, head_dim, vocab, window;  // window 0: none
    float epsilon;
    int64_t bf16;  // else fp32: what products of prompts take and give
};

struct Step {  // what changes from step to step
    int64_t tokens, length;        // length: tokens of one row, which follow each other
    int64_t kind, capacity;        // of keys and values; a position's lie in the column position % capacity
    const int64_t* positions;      // (tokens,)
    const int64_t* adapters;       // (tokens,) index into the adapters, -1 the base alone
    const float *cosines, *sines;  // (tokens, head_dim), the first half of sines negated
    void *const *keys, *const *values;  // a layer: (tokens / length, kv_heads, capacity, head_dim)
    float *const *key_scales, *const *value_scales;  // of int8, a layer: (tokens / length, kv_heads, capacity)
    float *x, *logits;             // (tokens, hidden), (tokens, vocab)
};

struct Prompt {
    int64_t rows, length, capacity;
    const int64_t* columns;        // (rows, length): where keys and values of the tokens are put
    const int64_t* adapters;       // (rows,) index into the adapters, -1 the base alone
    const float *cosines, *sines;  // (rows, length, head_dim), the first half of sines negated
};

struct Memory {  // of a cache
    int64_t kind, length;     // of keys and values; the tokens that it holds, padding included
    const int64_t* paddings;  // (rows,)
    void *const *keys, *const *values;               // a layer: (rows, kv_heads, capacity, head_dim)
    float *const *key_scales, *const *value_scales;  // of int8, a layer: (rows, kv_heads, capacity)
};

}  // extern "C"

namespace {

// Half-split, as Hugging Face; `to` may be x.
template <class T>
void rotate(const T* x, const float* cosines, const float* sines, long head_dim, T* to) {
    long half = head_dim / 2;
    for (long i = 0; i < half; i++) {
        float a = value(x[i]), b = value(x[i + half]);
        store(a * cosines[i] + b * sines[i], to[i]);
        store(b * cosines[i + half] + a * sines[i + half], to[i + half]);
    }
}

struct Rounded {  // an adapter's factors in bf16, the rank filled up with zeros to a multiple of 32
    Buffer<uint16_t> A, B;
    Matrix lower;  // of A
};

struct Phase {
    alignas(64) std::atomic<long> next;  // apart, since one is written while the other is waited for
    alignas(64) std::atomic<long> done;
};

struct Decoder {
    Shape shape;
    std::vector<Matrix> matrices;  // layers * SLOTS, then the head
    std::vector<const float*> norms;  // two a layer, then the last
    std::vector<std::vector<LowRank>> adapters;
    std::vector<std::map<long, Rounded>> rounded;  // by the matrix, of those whose prompts were read by tiles
    long max_rank = 0;

    Step step;
    std::vector<float> qkv, attended, product_of, low;

    // Threads go through the same phases; within one, each takes the next piece of work that nobody has taken.
    int threads;
    std::vector<Phase> phases;

    Decoder(const Shape& s, long thread_count) : shape(s), threads(thread_count), phases(s.layers * 10 + 2) {}

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    template <class Work>
    void phase(long& number, long pieces, Work work) {
        Phase& p = phases[number++];
        long mine = 0;
        for (long piece; (piece = p.next.fetch_add(1, std::memory_order_relaxed)) < pieces; mine++) work(piece);
        p.done.fetch_add(mine, std::memory_order_release);
        for (long spin = 0; p.done.load(std::memory_order_acquire) < pieces; spin++)
            spin < 10000 ? pause() : std::this_thread::yield();  // a thread that waits for long has lost its core
    }

    // Of a product: enough that no thread waits long for the last, few enough that taking them costs nothing.
    long pieces(long matrix) const {
        const Matrix& m = matrices[matrix];
        return std::clamp(m.out * m.in / PIECE, 1L, std::min(8L * threads, (long)m.out));
    }

    // work(first, end) for ranges that make up 0 .. count.
    template <class Work>
    void split(long count, Work work) const {
        long ranges = std::min(count, 4L * threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (long i = 0; i < ranges; i++) work(count * i / ranges, count * (i + 1) / ranges);
    }

    // --- A step of generation

    void decode(const Step& s) {
        step = s;
        qkv.resize(s.tokens * (shape.heads + 2 * shape.kv_heads) * shape.head_dim);
        attended.resize(s.tokens * shape.heads * shape.head_dim);
        product_of.resize(s.tokens * shape.intermediate);
        low.resize(s.tokens * SLOTS * max_rank);
        for (auto& p : phases) p.next = 0, p.done = 0;
#pragma omp parallel num_threads(threads)
        forward();
    }

    // x / rms(x) * weight, by each thread for itself: quicker than waiting for another.
    void normalise(const float* weight, std::vector<float>& normed) const {
        normed.resize(step.tokens * shape.hidden);
        for (long t = 0; t < step.tokens; t++) {
            const float* x = step.x + t * shape.hidden;
            float factor = 1 / std::sqrt(dot(x, x, shape.hidden) / shape.hidden + shape.epsilon);
            for (long i = 0; i < shape.hidden; i++) normed[t * shape.hidden + i] = x[i] * factor * weight[i];
        }
    }

    const LowRank* adapter(long token, long matrix) const {
        long index = step.adapters[token];
        if (index < 0 || matrix >= (long)adapters[index].size() || adapters[index][matrix].r == 0) return nullptr;
        return &adapters[index][matrix];
    }

    float* low_of(long token, long matrix) { return low.data() + (token * SLOTS + matrix % SLOTS) * max_rank; }

    // low = A x of every token's adapter, for `count` matrices from `first` on, which share the input.
    void lower(long& number, long first, long count, const float* x, long stride) {
        if (max_rank == 0) return;
        phase(number, step.tokens * count, [&](long piece) {
            long token = piece / count, matrix = first + piece % count, in = matrices[matrix].in;
            if (const LowRank* a = adapter(token, matrix))
                for (long j = 0; j < a->r; j++) low_of(token, matrix)[j] = dot(a->A + j * in, x + token * stride, in);
        });
    }

    // x of every token as the matrices read it, which share it; by each thread for itself.
    const float* arranged(long matrix, const float* x, std::vector<float>& own) const {
        const Matrix& m = matrices[matrix];
        if (m.kind != FOUR_BITS) return x;
        own.resize(step.tokens * m.in);
        arrange(x, step.tokens * m.in, own.data());
        return own.data();
    }

    // store(token, j, output j of the matrix with the token's adapter) for a piece of the outputs; x is `arranged`.
    template <class Store>
    void multiply(long piece, long matrix, const float* x, Store store) {
        const Matrix& m = matrices[matrix];
        long count = pieces(matrix), end = m.out * (piece + 1) / count;
        for (long j = m.out * piece / count; j < end; j++)
            for (long token = 0; token < step.tokens; token++) {  // for all but the first the weights are at hand
                float y = row_dot(m, j, x + token * m.in);
                if (const LowRank* a = adapter(token, matrix)) y += dot(a->B + j * a->r, low_of(token, matrix), a->r);
                store(token, j, y);
            }
    }

    void add_to_residual(long& number, long matrix, const std::vector<float>& from, std::vector<float>& own) {
        long out = matrices[matrix].out;
        lower(number, matrix, 1, from.data(), matrices[matrix].in);
        const float* x = arranged(matrix, from.data(), own);
        phase(number, pieces(matrix), [&](long piece) {
            multiply(piece, matrix, x, [&](long token, long j, float y) { step.x[token * out + j] += y; });
        });
    }

    void rotate(const float* x, long token, float* to) const {
        ::rotate(x, step.cosines + token * shape.head_dim, step.sines + token * shape.head_dim, shape.head_dim, to);
    }

    // The first head of a token's queries, then keys, then values.
    float* projected(long token, long head) {
        return qkv.data() + (token * (shape.heads + 2 * shape.kv_heads) + head) * shape.head_dim;
    }

    // What a layer's cache has of a token's row and a head: `width` numbers a column.
    template <class T>
    T* cached(T* const* tensors, long layer, long token, long kv_head, long width) const {
        return tensors[layer] + (token / step.length * shape.kv_heads + kv_head) * step.capacity * width;
    }

    // Stores head_dim numbers, with a scale if they are int8.
    template <class T>
    void store_head(const float* x, T* to, float* scale) const {
        for (long i = 0; i < shape.head_dim; i++) store(x[i], to[i]);
    }

    void store_head(const float* x, int8_t* to, float* scale) const {
        float largest = 1e-12f;
        for (long i = 0; i < shape.head_dim; i++) largest = std::max(largest, std::fabs(x[i]));
        *scale = largest / 127;
        for (long i = 0; i < shape.head_dim; i++) to[i] = int8_t(std::rint(x[i] / *scale));
    }

    template <class T>
    void remember(long layer, long token, long kv_head) {
        long d = shape.head_dim, column = step.positions[token] % step.capacity;
        float* k = projected(token, shape.heads + kv_head);
        rotate(k, token, k);
        auto keep = [&](const float* x, void* const* tensors, float* const* scales) {
            float* scale = step.kind == INT8 ? cached(scales, layer, token, kv_head, 1) + column : nullptr;
            store_head(x, cached((T* const*)tensors, layer, token, kv_head, d) + column * d, scale);
        };
        keep(k, step.keys, step.key_scales);
        keep(projected(token, shape.heads + shape.kv_heads + kv_head), step.values, step.value_scales);
    }

    template <class T>
    void attend(long layer, long token, long kv_head, std::vector<float>& weights) {
        long d = shape.head_dim, group = shape.heads / shape.kv_heads, capacity = step.capacity;
        long position = step.positions[token], start = shape.window ? std::max(0L, position - shape.window + 1) : 0L;
        const T* keys = cached((T* const*)step.keys, layer, token, kv_head, d);
        const T* values = cached((T* const*)step.values, layer, token, kv_head, d);
        const float *key_scales = nullptr, *value_scales = nullptr;
        if (step.kind == INT8) {
            key_scales = cached(step.key_scales, layer, token, kv_head, 1);
            value_scales = cached(step.value_scales, layer, token, kv_head, 1);
        }
        // work(position, column) for all that is seen, which lies in one piece or two.
        auto each = [&](auto work) {
            for (long t = start; t <= position;)
                for (long column = t % capacity; column < capacity && t <= position; t++, column++) work(t, column);
        };
        weights.resize(position + 1);
        for (long h = kv_head * group; h < (kv_head + 1) * group; h++) {
            float *query = projected(token, h), *out = attended.data() + (token * shape.heads + h) * d;
            rotate(query, token, query);
            float largest = -3e38f, total = 0, scale = 1 / std::sqrt(float(d));
            each([&](long t, long column) {
                weights[t] = scale * (key_scales ? key_scales[column] : 1) * dot(keys + column * d, query, d);
                largest = std::max(largest, weights[t]);
            });
            for (long t = start; t <= position; t++) total += weights[t] = exponential(weights[t] - largest);
            memset(out, 0, d * sizeof(float));
            each([&](long t, long column) {
                float share = weights[t] / total * (value_scales ? value_scales[column] : 1);
                for (long i = 0; i < d; i++) out[i] += share * value(values[column * d + i]);
            });
        }
    }

    void remember(long layer, long token, long kv_head) {
        if (step.kind == FP32) remember<float>(layer, token, kv_head);
        else if (step.kind == BF16) remember<uint16_t>(layer, token, kv_head);
        else remember<int8_t>(layer, token, kv_head);
    }

    void attend(long layer, long token, long kv_head, std::vector<float>& weights) {
        if (step.kind == FP32) attend<float>(layer, token, kv_head, weights);
        else if (step.kind == BF16) attend<uint16_t>(layer, token, kv_head, weights);
        else attend<int8_t>(layer, token, kv_head, weights);
    }

    void forward() {
        std::vector<float> normed, weights, own;
        long number = 0, hidden = shape.hidden, heads = step.tokens * shape.kv_heads;
        long q_size = shape.heads * shape.head_dim, kv_size = shape.kv_heads * shape.head_dim;
        for (long layer = 0; layer < shape.layers; layer++) {
            long first = layer * SLOTS;
            normalise(norms[2 * layer], normed);
            lower(number, first + Q, 3, normed.data(), hidden);
            const float* x = arranged(first + Q, normed.data(), own);
            long outputs = q_size + 2 * kv_size, q_pieces = pieces(first + Q), kv_pieces = pieces(first + K);
            phase(number, q_pieces + 2 * kv_pieces, [&](long piece) {
                long slot = piece < q_pieces ? Q : piece < q_pieces + kv_pieces ? K : V;
                long offset = slot == Q ? 0 : q_size + (slot - K) * kv_size;
                piece -= slot == Q ? 0 : q_pieces + (slot - K) * kv_pieces;
                multiply(piece, first + slot, x,
                         [&](long token, long j, float y) { qkv[token * outputs + offset + j] = y; });
            });
            if (step.length > 1)  // a token sees those before it in the step
                phase(number, heads,
                      [&](long piece) { remember(layer, piece / shape.kv_heads, piece % shape.kv_heads); });
            phase(number, heads, [&](long piece) {
                long token = piece / shape.kv_heads, kv_head = piece % shape.kv_heads;
                if (step.length == 1) remember(layer, token, kv_head);
                attend(layer, token, kv_head, weights);
            });
            add_to_residual(number, first + O, attended, own);
            normalise(norms[2 * layer + 1], normed);
            lower(number, first + GATE, 2, normed.data(), hidden);
            x = arranged(first + GATE, normed.data(), own);
            phase(number, pieces(first + GATE), [&](long piece) {
                auto at = [&](long token, long j) -> float& { return product_of[token * shape.intermediate + j]; };
                multiply(piece, first + GATE, x, [&](long token, long j, float y) { at(token, j) = silu(y); });
                multiply(piece, first + UP, x, [&](long token, long j, float y) { at(token, j) *= y; });
            });
            add_to_residual(number, first + DOWN, product_of, own);
        }
        normalise(norms[2 * shape.layers], normed);
        long head = matrices.size() - 1;
        const float* x = arranged(head, normed.data(), own);
        phase(number, pieces(head), [&](long piece) {
            multiply(piece, head, x,
                     [&](long token, long j, float y) { step.logits[token * shape.vocab + j] = y; });
        });
    }

    // --- Of a prompt, what lies between the matrix products; T is the dtype of the weights

    // x += added, normed = x / rms(x) * weight, for rows of x fp32.
    template <class T>
    void add_and_normalise(long rows, float* x, const T* added, long norm, T* normed) {
        const float* weight = norms[norm];
        long n = shape.hidden;
        split(rows, [&](long row, long end) {
            for (; row < end; row++) {
                float* own = x + row * n;
                if (added)
                    for (long i = 0; i < n; i++) own[i] += value(added[row * n + i]);
                float factor = 1 / std::sqrt(dot(own, own, n) / n + shape.epsilon);
                for (long i = 0; i < n; i++) store(own[i] * factor * weight[i], normed[row * n + i]);
            }
        });
    }

    // Queries (rows, length, heads * d) rotated to (rows, heads, length, d); keys, rotated, and values into the cache.
    template <class T>
    void rotate_and_store(const Prompt& p, const T* q, const T* k, const T* v, T* queries, T* keys, T* values) {
        long d = shape.head_dim;
        split(p.rows * p.length, [&](long token, long end) {
            for (; token < end; token++) {
                long row = token / p.length, at = token % p.length, column = p.columns[token];
                const float *cosines = p.cosines + token * d, *sines = p.sines + token * d;
                for (long h = 0; h < shape.heads; h++)
                    ::rotate(q + (token * shape.heads + h) * d, cosines, sines, d,
                             queries + ((row * shape.heads + h) * p.length + at) * d);
                for (long h = 0; h < shape.kv_heads; h++) {
                    long place = ((row * shape.kv_heads + h) * p.capacity + column) * d;
                    ::rotate(k + (token * shape.kv_heads + h) * d, cosines, sines, d, keys + place);
                    memcpy(values + place, v + (token * shape.kv_heads + h) * d, d * sizeof(T));
                }
            }
        });
    }

    // Rows first .. end of a quantized matrix, dense.
    template <class T>
    void unpack(const Matrix& m, long first, long end, T* to) {
        split(end - first, [&](long i, long last) {
            for (; i < last; i++) unpack_row(m, first + i, to + i * m.in);
        });
    }

    // Numbers (rows, kv_heads, length, d) into a cache of int8, and all that it then holds, (rows, kv_heads, total, d).
    void quantize(const Prompt& p, const uint16_t* numbers, int8_t* codes, float* scales, long total,
                  uint16_t* held) const {
        long d = shape.head_dim;
        split(p.rows * shape.kv_heads, [&](long head, long end) {
            std::vector<float> own(d);
            for (; head < end; head++) {
                for (long t = 0; t < p.length; t++) {
                    long place = head * p.capacity + p.columns[head / shape.kv_heads * p.length + t];
                    for (long i = 0; i < d; i++) own[i] = value(numbers[(head * p.length + t) * d + i]);
                    store_head(own.data(), codes + place * d, scales + place);
                }
                for (long t = 0; t < total; t++) {
                    long place = head * p.capacity + t;
                    for (long i = 0; i < d; i++)
                        store(codes[place * d + i] * scales[place], held[(head * total + t) * d + i]);
                }
            }
        });
    }

    // An adapter's factors as tiles read them.
    std::map<long, Rounded> round(const std::vector<LowRank>& adapter) const {
        std::map<long, Rounded> factors;
        for (long i = 0; i < (long)adapter.size(); i++) {
            const LowRank& a = adapter[i];
            long r = (a.r + 31) / 32 * 32, in = matrices[i].in, out = matrices[i].out;
            if (a.r == 0) continue;
            Rounded own{Buffer<uint16_t>(r * in), Buffer<uint16_t>(out * r), {}};
            std::fill_n((uint16_t*)own.A, r * in, 0);
            std::fill_n((uint16_t*)own.B, out * r, 0);
            for (long k = 0; k < a.r * in; k++) store(a.A[k], own.A[k]);
            for (long k = 0; k < out * a.r; k++) store(a.B[k], own.B[k / a.r * r + k % a.r]);
            own.lower = {BF16, r, in, own.A};
            factors.emplace(i, std::move(own));
        }
        return factors;
    }

    // Products of x, `length` tokens a row, with what each row's adapter adds: a few more columns to sum over, which
    // are zero for the tokens of other adapters and left out where a block has none of its own.
    void multiply(const Prompt& p, long length, const uint16_t* x, std::vector<Product> products) {
        long tokens = p.rows * length, blocks = (tokens + 31) / 32, in = products[0].matrix->in;
        std::vector<Buffer<uint16_t>> lows;
        for (long index = 0; index < (long)rounded.size(); index++) {
            std::vector<std::pair<long, long>> runs;  // of the adapter's tokens
            for (long row = 0; row < p.rows; row++) {
                if (p.adapters[row] != index) continue;
                if (!runs.empty() && runs.back().second == row * length) runs.back().second += length;
                else runs.push_back({row * length, (row + 1) * length});
            }
            if (runs.empty()) continue;
            std::vector<bool> own_blocks(blocks);
            for (auto [start, end] : runs)
                for (long block = start / 32; block * 32 < end; block++) own_blocks[block] = true;
            std::vector<Product> lowering;
            for (Product& product : products)
                for (const Matrix* matrix : {product.matrix, product.up}) {
                    if (!matrix) continue;
                    auto found = rounded[index].find(matrix - matrices.data());
                    if (found == rounded[index].end()) continue;
                    const Rounded& factors = found->second;
                    long r = factors.lower.out;
                    lows.emplace_back(blocks * 32 * r);
                    std::fill_n((uint16_t*)lows.back(), blocks * 32 * r, 0);
                    lowering.push_back({&factors.lower, nullptr, lows.back()});
                    const uint16_t* first = matrix == product.matrix ? (uint16_t*)factors.B : nullptr;
                    const uint16_t* second = product.up && first ? nullptr : (uint16_t*)factors.B;
                    product.updates.push_back({lows.back(), first, second, r, own_blocks});
                }
            for (auto [start, end] : runs) {
                std::vector<Product> own = lowering;
                for (Product& product : own) product.to += start * product.matrix->out;
                if (!own.empty()) multiply_tiled(own, end - start, x + start * in, threads);
            }
        }
        multiply_tiled(products, tokens, x, threads);
    }

    // A prompt by tiles, behind what the cache holds already, all of which its tokens see. Residuals x (rows, length,
    // hidden); last_normed (rows, hidden): of the last tokens, of which alone more is asked than keys and values.
    void read(const Prompt& p, const Memory& memory, float* x, uint16_t* last_normed) {
        long d = shape.head_dim, q_size = shape.heads * d, kv_size = shape.kv_heads * d, hidden = shape.hidden;
        long tokens = p.rows * p.length, total = memory.length + p.length;
        for (long row = 0; row < p.rows; row++) {
            long index = p.adapters[row];
            if (index >= 0 && rounded[index].empty()) rounded[index] = round(adapters[index]);
        }
        Buffer<uint16_t> normed(tokens * hidden), projected(tokens * (q_size + 2 * kv_size)), queries(tokens * q_size);
        Buffer<uint16_t> mixed(tokens * q_size), gated(tokens * shape.intermediate), added(tokens * hidden);
        uint16_t *k = projected + tokens * q_size, *v = k + tokens * kv_size;
        std::fill_n((uint16_t*)mixed, tokens * q_size, 0);  // padding's is never written
        bool in_place = memory.kind == BF16;
        long fresh = in_place ? 0 : tokens * kv_size, held = in_place ? 0 : p.rows * total * kv_size;
        Buffer<uint16_t> fresh_keys(fresh), fresh_values(fresh), held_keys(held), held_values(held);
        std::vector<int64_t> in_order(tokens);
        for (long i = 0; i < tokens; i++) in_order[i] = i % p.length;
        Prompt beside = p;
        beside.capacity = p.length, beside.columns = in_order.data();
        for (long layer = 0; layer < shape.layers; layer++) {
            const Matrix* own = matrices.data() + layer * SLOTS;
            uint16_t *keys = (uint16_t*)memory.keys[layer], *values = (uint16_t*)memory.values[layer];
            add_and_normalise<uint16_t>(tokens, x, layer ? (uint16_t*)added : nullptr, 2 * layer, normed);
            multiply(p, p.length, normed,
                     {{own + Q, nullptr, projected}, {own + K, nullptr, k}, {own + V, nullptr, v}});
            if (in_place) rotate_and_store<uint16_t>(p, projected, k, v, queries, keys, values);
            else {  // attention sees what a cache of int8 holds
                rotate_and_store<uint16_t>(beside, projected, k, v, queries, fresh_keys, fresh_values);
                quantize(p, fresh_keys, (int8_t*)keys, memory.key_scales[layer], total, held_keys);
                quantize(p, fresh_values, (int8_t*)values, memory.value_scales[layer], total, held_values);
                keys = held_keys, values = held_values;
            }
            std::vector<Attention> rows;
            long capacity = in_place ? p.capacity : total;
            for (long row = 0; row < p.rows; row++) {
                // A row's first token lies in its first column, whatever padding comes before it.
                long nothing = memory.paddings[row], start = std::max(0L, nothing - (long)memory.length);
                if (start >= p.length) continue;
                long before = std::max(0L, (long)memory.length - nothing), first = row * kv_size * capacity;
                rows.push_back({queries + row * p.length * q_size + start * d, keys + first, values + first,
                                mixed + (row * p.length + start) * q_size, before, p.length - start, p.length * d,
                                capacity, shape.heads, shape.kv_heads, d});
            }
            if (!rows.empty()) attend_tiled(rows, threads);
            if (layer == shape.layers - 1) {
                for (long row = 0; row < p.rows; row++) {
                    long last = (row + 1) * p.length - 1;
                    std::copy_n(x + last * hidden, hidden, x + row * hidden);
                    std::copy_n(mixed + last * q_size, q_size, mixed + row * q_size);
                }
                tokens = p.rows;
            }
            long length = tokens / p.rows;
            multiply(p, length, mixed, {{own + O, nullptr, added}});
            add_and_normalise<uint16_t>(tokens, x, added, 2 * layer + 1, normed);
            multiply(p, length, normed, {{own + GATE, own + UP, gated}});
            multiply(p, length, gated, {{own + DOWN, nullptr, added}});
        }
        add_and_normalise<uint16_t>(tokens, x, added, 2 * shape.layers, last_normed);
    }

    template <class T>
    void gate_times_up(long count, T* gate, const T* up) {
        split(count, [&](long i, long end) {
            for (; i < end; i++) store(silu(value(gate[i])) * value(up[i]), gate[i]);
        });
    }
};

// Calls back with a zero of the type that weights are computed with.
template <class Call>
void with_dtype(void* handle, Call call) {
    Decoder& decoder = *(Decoder*)handle;
    if (decoder.shape.bf16) call(decoder, uint16_t());
    else call(decoder, float());
}

}  // namespace

extern "C" {

void* decoder_new(const Shape* shape, const Matrix* matrices, const float* const* norms, int64_t threads) {
    Decoder* decoder = new Decoder(*shape, threads);
    decoder->matrices.assign(matrices, matrices + shape->layers * SLOTS + 1);
    decoder->norms.assign(norms, norms + 2 * shape->layers + 1);
    return decoder;
}

void decoder_set_adapters(void* handle, const LowRank* adapters, int64_t count) {
    Decoder* decoder = (Decoder*)handle;
    long matrices = decoder->shape.layers * SLOTS;
    decoder->adapters.clear();
    decoder->rounded = std::vector<std::map<long, Rounded>>(count);
    decoder->max_rank = 0;
    for (long i = 0; i < count; i++) {
        decoder->adapters.emplace_back(adapters + i * matrices, adapters + (i + 1) * matrices);
        for (const LowRank& a : decoder->adapters.back()) decoder->max_rank = std::max(decoder->max_rank, (long)a.r);
    }
}

void decoder_step(void* handle, const Step* step) { ((Decoder*)handle)->decode(*step); }

void decoder_add_and_normalise(void* handle, int64_t rows, float* x, const void* added, int64_t norm, void* normed) {
    with_dtype(handle, [=](Decoder& decoder, auto zero) {
        decoder.add_and_normalise(rows, x, (const decltype(zero)*)added, norm, (decltype(zero)*)normed);
    });
}

void decoder_rotate_and_store(void* handle, const Prompt* prompt, const void* q, const void* k, const void* v,
                              void* queries, void* keys, void* values) {
    with_dtype(handle, [=](Decoder& decoder, auto zero) {
        using T = decltype(zero);
        decoder.rotate_and_store(*prompt, (const T*)q, (const T*)k, (const T*)v, (T*)queries, (T*)keys, (T*)values);
    });
}

void decoder_unpack(void* handle, int64_t matrix, int64_t first, int64_t end, int64_t bf16, void* to) {
    Decoder* decoder = (Decoder*)handle;
    if (bf16) decoder->unpack(decoder->matrices[matrix], first, end, (uint16_t*)to);
    else decoder->unpack(decoder->matrices[matrix], first, end, (float*)to);
}

int64_t decoder_tiles() { return tiles_permitted(); }

void decoder_multiply_prompt(void* handle, int64_t matrix, int64_t up, int64_t tokens, const void* x, void* to) {
    Decoder* decoder = (Decoder*)handle;
    const Matrix *first = &decoder->matrices[matrix], *second = up < 0 ? nullptr : &decoder->matrices[up];
    multiply_tiled({{first, second, (uint16_t*)to}}, tokens, (const uint16_t*)x, decoder->threads);
}

void decoder_read_prompt(void* handle, const Prompt* prompt, const Memory* memory, float* x, void* normed) {
    ((Decoder*)handle)->read(*prompt, *memory, x, (uint16_t*)normed);
}

void decoder_attend_prompt(void* handle, int64_t length, int64_t stride, int64_t capacity, const void* queries,
                           const void* keys, const void* values, void* mixed) {
    const Decoder& decoder = *(Decoder*)handle;
    const Shape& shape = decoder.shape;
    attend_tiled({{(const uint16_t*)queries, (const uint16_t*)keys, (const uint16_t*)values, (uint16_t*)mixed, 0,
                   length, stride, capacity, shape.heads, shape.kv_heads, shape.head_dim}},
                 decoder.threads);
}

void decoder_gate_times_up(void* handle, int64_t count, void* gate, const void* up) {
    with_dtype(handle, [=](Decoder& decoder, auto zero) {
        decoder.gate_times_up(count, (decltype(zero)*)gate, (const decltype(zero)*)up);
    });
}

void decoder_delete(void* handle) { delete (Decoder*)handle; }

}  // extern "C"
