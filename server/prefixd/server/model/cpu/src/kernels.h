// The table of kernels that each instruction set fills. All loops over rows, panels and items are in
// decoder.cpp, which divides them among the threads; a kernel runs on one thread.
//
// Operand: what a product reads. bfloat16 where the instruction set multiplies it (AVX512_BF16, AMX)
// and the weights are bfloat16; else float32. Weights are float32 or bfloat16, or int8 with scales.
//
// Products with int8 weights read rounded rows: a RowHeader, then the row's codes (integers of -127 to
// 127, of the type that the instruction set multiplies), zeros up to a whole number of cache lines.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pfx {

using bf16 = uint16_t;  // the upper half of a float32

// A packed matrix: panels of `columns` outputs, each [inner, columns] (bfloat16: [inner / 2, columns,
// 2], pairs of inputs side by side, an odd last one padded with zero; int8: [inner / 4, columns, 4]).
// The last panel is padded. What the int8 kernels of a set pack, only they read.
struct Packed {
    void* data = nullptr;
    const float* bias = nullptr;    // [outputs padded to whole panels] or null
    const float* scales = nullptr;  // the same of int8 weights: a weight is its code times the scale
    int outputs = 0, inner = 0;
    int panels = 0;
};

enum class Epilogue {
    store,     // out float32 [M, ldo] = product + bias
    add,       // out float32 [M, ldo] += product + bias
    gated,     // panels alternate gate and up: out operand [M, ldo] = silu(gate) * up
};

struct Product {
    const void* a;       // operand rows; of int8 weights rounded rows
    int rows;
    size_t row_bytes;    // of `a`, from one row to the next
    const Packed* weights;
    Epilogue epilogue;
    void* out;
    int ldo;
};

constexpr int kLine = 64;  // bytes of a cache line

// A row is codes times the scale. Of a row with NaN or infinity the scale is NaN and all codes are zero.
struct alignas(kLine) RowHeader {
    float scale;
    int32_t sum;  // of the codes
};

// More inputs could exceed the int32 sums.
constexpr int kMaxInt8Inputs = INT32_MAX / (127 * 127);

// Products with int8 weights.
struct Int8Kernels {
    int code_size;  // bytes of a rounded row's code

    // As Kernels::pack, from int8 weights of -127 to 127.
    void (*pack)(const void* weight, int outputs, int inner, void* out, int first, int last);
    // Rows [first, last) of operand [*, inner] -> rounded rows, each with the scale max|x| / 127 and
    // codes that are the nearest, ties to even. Where that scale is no normal number, it is 0.
    void (*round_rows)(const void* operand, int inner, void* out, int first, int last);
    // As Kernels::multiply; out = float(sum of codes' products) * (row's scale * column's) + bias.
    void (*multiply)(const Product& product, int first, int last);

    size_t row_bytes(int inner) const {
        return sizeof(RowHeader) + ((size_t)inner * code_size + kLine - 1) / kLine * kLine;
    }
};

// One layer's share of the pool. float32: a block of a head is keys [head_dim][16] and values
// [16][head_dim] for each run of 16 positions. bfloat16: keys [head_dim / 2][16][2], values
// [8][head_dim][2]: pairs along the inner dimension of the product side by side.
// Offset of (block, head): (block * num_kv_heads + head) * block_size * head_dim elements.
struct Pool {
    void *keys, *values;
};

struct AttentionShape {
    int num_heads, num_kv_heads, head_dim, rotary_dim, block_size;
    float scale, norm_eps;
};

// The batch, the same for all layers. A query sees the positions of its row up to its own.
//
// With `counts` [num_rows] it is that of gated prefixes: every query of a row sees the first `counts`
// positions of its table, and the result is added to what is in the output.
struct Batch {
    const int32_t *offsets, *lengths, *starts, *tables;
    int table_width, num_rows;
    const int32_t *row_of, *position_of;  // [num_tokens]
    const int32_t *counts = nullptr;
};

// A prefill is fastest with about this many queries times heads of a KV head's group in an item.
constexpr int kItemQueries = 48;

// Work of one thread in attention: rows[0 .. num_rows) (one row, or several decode rows whose tables
// share their first `shared` blocks), one KV head, queries [first_query, last_query) of each row.
struct AttentionItem {
    const int32_t* rows;
    int num_rows, shared, head, first_query, last_query;
    const AttentionItem* next;  // what this thread does afterwards, to load its blocks ahead; or null
};

struct Kernels {
    int panel_columns;   // of Packed, in float32 and in bfloat16
    bool bf16_operands;  // the operand type is bfloat16

    // Fill panels [first, last) of `out` from weight [outputs, inner] (in the table's weight type).
    void (*pack)(const void* weight, int outputs, int inner, void* out, int first, int last);
    // Row `index` of the packed matrix, as float32 [inner] (an embedding from the head).
    void (*unpack_row)(const Packed& weights, int index, float* out);
    // Panels [first, last) of a product.
    void (*multiply)(const Product& product, int first, int last);

    Int8Kernels int8;

    // RMS norm of rows [first, last): x float32 [*, width] -> operand [*, width].
    void (*norm)(const float* x, const float* weight, void* out, int width, float eps, int first, int last);
    // Tokens [first, last): normalise heads (q_norm, k_norm or null), rotate queries and keys of
    // qkv float32 [*, (heads + 2 kv_heads) * head_dim], write queries as operand [*, heads * head_dim]
    // and keys and values to the pool.
    void (*rotate_and_write)(const float* qkv, void* queries, const Pool& pool, const Batch& batch,
                             const AttentionShape& shape, const float* q_norm, const float* k_norm,
                             const float* cosine, const float* sine, int first, int last);
    // One item: queries operand -> out operand [*, heads * head_dim]. `scratch` is the thread's own.
    void (*attend)(const void* queries, void* out, const Pool& pool, const Batch& batch,
                   const AttentionShape& shape, const AttentionItem& item, struct Scratch& scratch);
    // Largest of n logits: first index, and its value or NaN.
    void (*largest)(const float* logits, int n, int32_t* index, float* value);

    // Copies between the pool's layout and rows of kv_heads * head_dim in the weight type.
    void (*write_kv)(const Pool&, const AttentionShape&, const int32_t* table, int start, int count,
                     const void* keys, const void* values);
    void (*read_kv)(const Pool&, const AttentionShape&, const int32_t* table, int start, int count,
                    void* keys, void* values);
};

// A buffer of one thread that grows and is reused.
struct Scratch {
    void* data = nullptr;
    size_t size = 0;
    void* at_least(size_t bytes);
    ~Scratch();
};

// By weight type (pfx_dtype) and pfx_isa; null where the build lacks it.
const Kernels* kernels_for(int dtype, int isa);

}  // namespace pfx
