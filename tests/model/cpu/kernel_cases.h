// Random batches for the kernels, and what attention over them is in float64.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace pfx;

inline std::mt19937 generator(11);

inline float random_float() { return std::normal_distribution<float>()(generator); }

inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

// Round to nearest, ties to even, done otherwise than in the kernels: through the two neighbours.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bf16 low = bits >> 16;
    if (std::isnan(x)) return low | 0x40;
    if (std::isinf(x)) return low;
    bf16 high = low + 1;
    double below = std::fabs((double)x - to_float(low)), above = std::fabs((double)to_float(high) - x);
    if (std::isinf(to_float(high))) above = std::fabs(std::ldexp(x > 0 ? 1.0 : -1.0, 128) - x);
    if (below == above) return low % 2 ? high : low;
    return below < above ? low : high;
}

// Elements of a kernel's float32 or bfloat16 array.
struct Array {
    bool half;
    std::vector<float> floats;
    std::vector<bf16> halves;

    Array(bool half, size_t size) : half(half), floats(half ? 0 : size), halves(half ? size : 0) {}
    void* data() { return half ? (void*)halves.data() : (void*)floats.data(); }
    size_t size() const { return half ? halves.size() : floats.size(); }
    float get(size_t i) const { return half ? to_float(halves[i]) : floats[i]; }
    void set(size_t i, float x) {
        if (half) halves[i] = to_bf16(x);
        else floats[i] = x;
    }
    void fill_random() {
        for (size_t i = 0; i < size(); i++) set(i, random_float());
    }
    const char* bytes() { return (const char*)data(); }
    size_t element() const { return half ? 2 : 4; }
};

struct Row {
    int start, length;
};

// A ragged batch with its pool. The first `shared` blocks of all tables are the same ones.
struct World {
    const Kernels& kernels;
    bool half_pool;
    AttentionShape shape;
    std::vector<Row> rows;
    int shared, table_width = 0, num_tokens = 0, num_blocks = 1;
    std::vector<int32_t> offsets, lengths, starts, tables, row_of, position_of;
    Array keys_pool, values_pool, queries, out;
    std::vector<Array> keys, values;  // per row [positions, kv_heads * head_dim]

    World(const Kernels& kernels, bool half_pool, AttentionShape shape, std::vector<Row> rows, int shared)
        : kernels(kernels), half_pool(half_pool), shape(shape), rows(rows), shared(shared),
          keys_pool(half_pool, 0), values_pool(half_pool, 0), queries(kernels.bf16_operands, 0),
          out(kernels.bf16_operands, 0) {
        lay_out();
        fill();
    }

    int end(int row) const { return rows[row].start + rows[row].length; }
    int width() const { return shape.num_kv_heads * shape.head_dim; }
    Pool pool() { return {keys_pool.data(), values_pool.data()}; }

    Batch batch() const {
        return {offsets.data(),    lengths.data(),   starts.data(), tables.data(), table_width,
                (int)rows.size(), row_of.data(), position_of.data()};
    }

    void lay_out() {
        for (size_t r = 0; r < rows.size(); r++)
            table_width = std::max(table_width, (end(r) + shape.block_size - 1) / shape.block_size);
        num_blocks += shared;
        for (size_t r = 0; r < rows.size(); r++) {
            offsets.push_back(num_tokens);
            lengths.push_back(rows[r].length);
            starts.push_back(rows[r].start);
            for (int p = rows[r].start; p < end(r); p++) {
                row_of.push_back(r);
                position_of.push_back(p);
            }
            num_tokens += rows[r].length;
            for (int b = 0; b < table_width; b++)  // entries past the end must not be read
                tables.push_back(b < shared ? 1 + b : b * shape.block_size < end(r) ? num_blocks++ : -1);
        }
    }

    void fill() {
        size_t elements = (size_t)num_blocks * shape.block_size * width();
        keys_pool = Array(half_pool, elements);
        values_pool = Array(half_pool, elements);
        queries = Array(kernels.bf16_operands, (size_t)num_tokens * shape.num_heads * shape.head_dim);
        out = queries;
        queries.fill_random();
        for (size_t r = 0; r < rows.size(); r++) {
            keys.emplace_back(half_pool, (size_t)end(r) * width());
            values.push_back(keys[r]);
            keys[r].fill_random();
            values[r].fill_random();
            size_t same = r ? (size_t)shared * shape.block_size * width() * keys[r].element() : 0;
            if (same) memcpy(keys[r].data(), keys[0].data(), same);
            if (same) memcpy(values[r].data(), values[0].data(), same);
            write(r);
        }
    }

    const int32_t* table(int row) const { return tables.data() + (size_t)row * table_width; }

    void write(int row) {
        kernels.write_kv(pool(), shape, table(row), 0, end(row), keys[row].data(), values[row].data());
    }

    // Fills what lies past the end of each row in its last block.
    void fill_tails(float value) {
        for (size_t r = 0; r < rows.size(); r++) {
            int count = table_blocks(r) * shape.block_size - end(r);
            Array tail(half_pool, (size_t)count * width());
            for (size_t i = 0; i < tail.size(); i++) tail.set(i, value);
            if (count) kernels.write_kv(pool(), shape, table(r), end(r), count, tail.data(), tail.data());
        }
    }

    int table_blocks(int row) const { return (end(row) + shape.block_size - 1) / shape.block_size; }

    void run(std::vector<AttentionItem> items) {
        Scratch scratch;
        for (size_t i = 0; i + 1 < items.size(); i++) items[i].next = &items[i + 1];
        for (const AttentionItem& item : items)
            kernels.attend(queries.data(), out.data(), pool(), batch(), shape, item, scratch);
    }

    // All rows together; each has the same number of queries.
    void attend_together() {
        std::vector<int32_t> all(rows.size());
        for (size_t r = 0; r < rows.size(); r++) all[r] = r;
        std::vector<AttentionItem> items;
        for (int head = 0; head < shape.num_kv_heads; head++)
            items.push_back({all.data(), (int)all.size(), shared, head, 0, rows[0].length, nullptr});
        run(items);
    }

    // Every row by itself, `tile` queries at a time.
    void attend_rows(int tile) {
        std::vector<int32_t> all(rows.size());
        std::vector<AttentionItem> items;
        for (size_t r = 0; r < rows.size(); r++) {
            all[r] = r;
            for (int head = 0; head < shape.num_kv_heads; head++)
                for (int first = 0; first < rows[r].length; first += tile)
                    items.push_back({&all[r], 1, 0, head, first, std::min(rows[r].length, first + tile), nullptr});
        }
        run(items);
    }

    std::vector<double> expected(int row, int query, int head) const {
        const int kv_head = head / (shape.num_heads / shape.num_kv_heads), d = shape.head_dim;
        const int visible = rows[row].start + query + 1;
        const size_t q = ((size_t)(offsets[row] + query) * shape.num_heads + head) * d;
        std::vector<double> scores(visible), sums(d);
        double largest = -INFINITY, total = 0;
        for (int p = 0; p < visible; p++) {
            for (int i = 0; i < d; i++)
                scores[p] += (double)queries.get(q + i) * keys[row].get((size_t)p * width() + kv_head * d + i);
            scores[p] *= shape.scale;
            largest = std::max(largest, scores[p]);
        }
        for (int p = 0; p < visible; p++) {
            double weight = std::exp(scores[p] - largest);
            total += weight;
            for (int i = 0; i < d; i++) sums[i] += weight * values[row].get((size_t)p * width() + kv_head * d + i);
        }
        for (double& x : sums) x /= total;
        return sums;
    }

    // Largest difference from float64 over the outputs of a row (at most 8 of its queries).
    double error(int row) const {
        double worst = 0;
        int step = std::max(1, rows[row].length / 8);
        for (int query = rows[row].length - 1; query >= 0; query -= step)
            for (int head = 0; head < shape.num_heads; head++) {
                std::vector<double> right = expected(row, query, head);
                size_t at = ((size_t)(offsets[row] + query) * shape.num_heads + head) * shape.head_dim;
                for (int i = 0; i < shape.head_dim; i++) {
                    double difference = std::fabs(out.get(at + i) - right[i]);
                    if (!(difference <= worst)) worst = difference;  // NaN is the worst
                }
            }
        return worst;
    }
};
