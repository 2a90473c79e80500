#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "model.h"
#include "plan.h"

namespace pfx {

constexpr int kRun = 16;  // positions side by side in the pool
constexpr int kMaxHeadDim = 256;
constexpr int kMaxTokens = 1 << 20;

void check(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

std::string expected(const std::string& name, const std::string& what, long long value) {
    return name + ": expected " + what + ", got " + std::to_string(value);
}

static void check_range(const std::string& name, int value, int first, int last) {
    if (value < first || value > last)
        throw std::invalid_argument(
            expected(name, std::to_string(first) + " to " + std::to_string(last), value));
}

static void check_positive(const std::string& name, int value) {
    check_range(name, value, 1, INT32_MAX);
}

void check_shape(const pfx_shape& shape) {
    check_range("dtype", shape.dtype, PFX_F32, PFX_BF16);
    check_positive("num_layers", shape.num_layers);
    check_positive("num_heads", shape.num_heads);
    check_positive("num_kv_heads", shape.num_kv_heads);
    check(shape.num_heads % shape.num_kv_heads == 0,
          expected("num_heads", "a multiple of num_kv_heads " + std::to_string(shape.num_kv_heads), shape.num_heads));
    check_range("head_dim", shape.head_dim, kRun, kMaxHeadDim);
    check(shape.head_dim % kRun == 0, expected("head_dim", "a multiple of 16", shape.head_dim));
    check_positive("width", shape.width);
    check_positive("vocab", shape.vocab);
    check_positive("embeddings", shape.embeddings);
    check_range("rotary_dim", shape.rotary_dim, 0, shape.head_dim);
    check(shape.rotary_dim % 2 == 0, expected("rotary_dim", "an even number", shape.rotary_dim));
    check_positive("max_positions", shape.max_positions);
    check_positive("block_size", shape.block_size);
    check(shape.block_size % kRun == 0, expected("block_size", "a multiple of 16", shape.block_size));
}

void check_int8(const std::string& name, const void* weight, const float* scales, size_t rows, int inner) {
    check(inner <= kMaxInt8Inputs,
          expected(name, "at most " + std::to_string(kMaxInt8Inputs) + " inputs of int8", inner));
    for (size_t row = 0; row < rows; row++) {
        const int8_t* codes = static_cast<const int8_t*>(weight) + row * inner;
        const auto of_row = [&](const char* what) { return name + ": " + what + " of row " + std::to_string(row); };
        if (std::memchr(codes, -128, inner))
            throw std::invalid_argument(expected(of_row("weight"), "-127 to 127", -128));
        if (scales[row] == 0 && std::all_of(codes, codes + inner, [](int8_t code) { return code == 0; })) continue;
        if (scales[row] > 0 && !std::isinf(scales[row])) continue;
        char value[32];
        std::snprintf(value, sizeof value, "%g", scales[row]);
        throw std::invalid_argument(of_row("scale") + ": expected a finite number above 0, got " + value);
    }
}

// Those that are multiplied together have scales all or none.
static void check_scales_alike(const std::string& names, const std::vector<pfx_linear>& linears) {
    const int count = linears.size();
    const int scaled = std::count_if(linears.begin(), linears.end(), [](const auto& of) { return of.scales; });
    check(scaled == 0 || scaled == count,
          expected(names, "scales of all " + std::to_string(count) + " or none", scaled));
}

void check_int8_layer(const pfx_layer& layer, const pfx_shape& shape) {
    const int width = shape.width, heads = shape.num_heads * shape.head_dim;
    const int kv_heads = shape.num_kv_heads * shape.head_dim;
    const struct {
        const char* name;
        const pfx_linear& linear;
        int outputs, inner;
    } linears[] = {{"q", layer.q, heads, width},           {"k", layer.k, kv_heads, width},
                   {"v", layer.v, kv_heads, width},        {"o", layer.o, width, heads},
                   {"gate", layer.gate, layer.inner, width}, {"up", layer.up, layer.inner, width},
                   {"down", layer.down, width, layer.inner}};
    check_scales_alike("q, k and v", {layer.q, layer.k, layer.v});
    check_scales_alike("gate and up", {layer.gate, layer.up});
    for (const auto& of : linears) {
        if (!of.linear.scales) continue;
        check(of.linear.weight, std::string(of.name) + ": expected weights for the scales, got NULL");
        check_int8(of.name, of.linear.weight, of.linear.scales, of.outputs, of.inner);
    }
    check(layer.experts > 0 || (!layer.expert_gate_up_scales && !layer.expert_down_scales),
          "expected scales of experts NULL without experts, got an address");
}

static std::string of_row(const char* name, int row) { return std::string(name) + " of row " + std::to_string(row); }

static void check_row(const pfx_step& step, int row, int first_token, const pfx_shape& shape, int num_blocks) {
    if (step.offsets[row] != first_token)
        throw std::invalid_argument(expected(of_row("offset", row), std::to_string(first_token), step.offsets[row]));
    if (step.lengths[row] < 1 || step.lengths[row] > step.num_tokens - first_token)
        check_range(of_row("length", row), step.lengths[row], 1, step.num_tokens - first_token);
    if (step.starts[row] < 0 || step.starts[row] > shape.max_positions - step.lengths[row])
        check_range(of_row("start", row), step.starts[row], 0, shape.max_positions - step.lengths[row]);
    const int end = step.starts[row] + step.lengths[row];
    const int blocks = (end - 1) / shape.block_size + 1;
    if (blocks > step.table_width)
        throw std::invalid_argument(expected("table_width", "at least " + std::to_string(blocks) + " for row " +
                                             std::to_string(row), step.table_width));
    for (int i = 0; i < blocks; i++) {
        const int block = step.tables[(size_t)row * step.table_width + i];
        if (block < 0 || block >= num_blocks)
            check_range(of_row("block", row), block, 0, num_blocks - 1);
    }
}

static void check_gated(const pfx_step& step, const pfx_shape& shape, int num_blocks) {
    check(step.gated_layers && step.gated_tables, "expected gated_layers and gated_tables, got NULL");
    check_range("gated_width", step.gated_width, 0, num_blocks);
    for (int row = 0; row < step.num_rows; row++) {
        const int count = step.gated_counts[row];
        if (count < 0 || count > step.gated_width * shape.block_size)
            check_range(of_row("gated_count", row), count, 0, step.gated_width * shape.block_size);
        if (count == 0) continue;
        check_range(of_row("gated_layer", row), step.gated_layers[row], 0, shape.num_layers - 1);
        for (int i = 0; i * shape.block_size < count; i++) {
            const int block = step.gated_tables[(size_t)row * step.gated_width + i];
            if (block < 0 || block >= num_blocks)
                check_range(of_row("gated_block", row), block, 0, num_blocks - 1);
        }
    }
}

void check_step(const pfx_step& step, const pfx_shape& shape, int num_blocks) {
    check_range("num_tokens", step.num_tokens, 0, kMaxTokens);
    check_range("num_rows", step.num_rows, 0, step.num_tokens);
    check_range("num_outputs", step.num_outputs, 0, step.num_tokens);
    check(step.num_tokens == 0 || (step.token_ids && step.offsets && step.lengths && step.starts && step.tables),
          "expected token_ids, offsets, lengths, starts and tables, got NULL");
    check(step.num_outputs == 0 || (step.outputs && step.logits && step.best && step.best_value),
          "expected outputs, logits, best and best_value, got NULL");
    if (step.num_outputs > 0) check_range("candidates", step.candidates, 1, shape.vocab);
    for (int i = 0; i < step.num_tokens; i++) {
        const int id = step.token_ids[i];
        if (id < -1 || id >= shape.embeddings) check_range("token id", id, -1, shape.embeddings - 1);
        if (id == -1 && !step.inputs) check(false, "expected inputs for the tokens of id -1, got NULL");
    }
    int token = 0;
    for (int row = 0; row < step.num_rows; row++) {
        check_row(step, row, token, shape, num_blocks);
        token += step.lengths[row];
    }
    if (step.gated_counts) check_gated(step, shape, num_blocks);
    check(token == step.num_tokens,
          expected("num_tokens", "the sum of lengths " + std::to_string(token), step.num_tokens));
    for (int i = 0; i < step.num_outputs; i++)
        if (step.outputs[i] < 0 || step.outputs[i] >= step.num_tokens)
            check_range("output", step.outputs[i], 0, step.num_tokens - 1);
}

}  // namespace pfx
