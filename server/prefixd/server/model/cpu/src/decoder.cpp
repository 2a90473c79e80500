#include "decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace pfx {

namespace {

constexpr int kNormElements = 16384;  // of a norm, or a rounding, on one thread: less is not worth dividing
constexpr int kRotateRows = 8;
constexpr int kProductRows = 96;  // a product is divided by rows as well where it has few panels
constexpr int kItemsPerThread = 4;

}  // namespace

Decoder::Decoder(const pfx_shape& shape, const Kernels& kernels)
    : weights(shape, kernels), threads(new ThreadPool(1, 0)),
      attention_{shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.rotary_dim,
                 shape.block_size, shape.attention_scale, shape.norm_eps},
      scratch_(1) {}

void Decoder::set_threads(int count, int spin_us) {
    threads.reset();
    threads.reset(new ThreadPool(1, 0));  // what stays if the system refuses
    if (count > 1) threads.reset(new ThreadPool(count, spin_us));
    scratch_ = std::vector<Scratch>(count);
}

void Decoder::run(const pfx_step& step) {
    weights.check_complete();
    check(kv_ != nullptr, "expected pfx_set_pool before, got none");
    check_step(step, weights.shape, num_blocks_);
    if (step.num_tokens == 0) return;
    const int64_t begin = now_ns(), waited = threads->wait_ns();
    threads->begin_step();
    run_phases(step);
    counters.late_steps += threads->end_step();
    counters.steps++;
    counters.step_ns += now_ns() - begin;
    counters.wait_ns += threads->wait_ns() - waited;
    counters.threads = threads->num_active();
    counters.thread_changes = threads->num_changes();
}

void Decoder::run_phases(const pfx_step& step) {
    plan_.fill(step, attention_, threads->num_active());
    embed(step);
    const int last = weights.shape.num_layers - 1;
    for (int i = 0; i < last; i++) {
        attend(weights.layers[i], i, step.num_tokens);
        finish_layer(weights.layers[i], {(float*)buffers_.x.at_least(0), buffers_.attended.at_least(0),
                                         step.num_tokens});
    }
    // Of the last layer, other tokens than those of the outputs only write their keys and values.
    attend(weights.layers[last], last, step.num_tokens);
    if (step.num_outputs == 0) return;
    const Rows rows = keep(step);
    finish_layer(weights.layers[last], rows);
    finish(step, rows);
}

void Decoder::embed(const pfx_step& step) {
    const size_t width = weights.shape.width;
    float* x = (float*)buffers_.x.at_least(step.num_tokens * width * sizeof(float));
    for_rows(step.num_tokens, kRotateRows, [&](int first, int last) {
        for (int i = first; i < last; i++) {
            if (step.token_ids[i] >= 0) {
                weights.read_embedding(step.token_ids[i], x + i * width);
            } else {
                const size_t offset = plan_.input_of[i] * width * weights.element_size();
                weights.widen((const char*)step.inputs + offset, width, x + i * width);
            }
        }
    });
}

void Decoder::norm(const float* x, const float* weight, void* out, int rows) {
    const int width = weights.shape.width;
    for_rows(rows, kNormElements / width, [&](int first, int last) {
        weights.kernels.norm(x, weight, out, width, weights.shape.norm_eps, first, last);
    });
}

// The operand rows, or what they are rounded to where the weights are int8: then until the next call.
Decoder::Inputs Decoder::inputs_of(const Packed& packed, const void* operand, int rows) {
    if (!packed.scales) return {operand, packed.inner * operand_size()};
    const size_t row_bytes = weights.kernels.int8.row_bytes(packed.inner);
    void* rounded = buffers_.rounded.at_least(rows * row_bytes);
    for_rows(rows, kNormElements / packed.inner, [&](int first, int last) {
        weights.kernels.int8.round_rows(operand, packed.inner, rounded, first, last);
    });
    return {rounded, row_bytes};
}

void Decoder::multiply(const void* operand, int rows, const Packed& packed, Epilogue epilogue, void* out, int ldo) {
    const bool gated = epilogue == Epilogue::gated;
    const int halves = gated ? 2 : 1, panels = packed.panels / halves;
    const int wanted = threads->num_active() * kItemsPerThread;
    const int chunks = std::max(1, std::min(rows / kProductRows, (wanted + panels - 1) / panels));
    const int of_chunk = ((rows + chunks - 1) / chunks + kProductRows - 1) / kProductRows * kProductRows;
    const int at_once = chunks == 1 ? rows : of_chunk;
    const size_t out_size = gated ? operand_size() : sizeof(float);
    const Inputs inputs = inputs_of(packed, operand, rows);
    threads->run(panels * ((rows + at_once - 1) / at_once), [&](int item, int) {
        const int panel = item % panels * halves, row = item / panels * at_once;
        multiply_of(packed)({inputs.row(row), std::min(at_once, rows - row), inputs.row_bytes, &packed, epilogue,
                             (char*)out + row * ldo * out_size, ldo}, panel, panel + halves);
    });
}

void Decoder::attend(const Layer& layer, int index, int num_tokens) {
    const pfx_shape& shape = weights.shape;
    const size_t heads = shape.num_heads * shape.head_dim, rows = num_tokens;
    const int qkv_width = layer.qkv.outputs;
    void* normed = buffers_.normed.at_least(rows * shape.width * operand_size());
    float* qkv = (float*)buffers_.qkv.at_least(rows * qkv_width * sizeof(float));
    void* queries = buffers_.queries.at_least(rows * heads * operand_size());
    void* attended = buffers_.attended.at_least(rows * heads * operand_size());
    norm((const float*)buffers_.x.at_least(0), layer.input_norm, normed, num_tokens);
    multiply(normed, num_tokens, layer.qkv, Epilogue::store, qkv, qkv_width);
    const Pool pool = pool_of(index);
    for_rows(num_tokens, kRotateRows, [&](int first, int last) {
        weights.kernels.rotate_and_write(qkv, queries, pool, plan_.batch, attention_, layer.q_norm, layer.k_norm,
                                         weights.cosine, weights.sine, first, last);
    });
    threads->run((int)plan_.items.size(), [&](int item, int thread) {
        weights.kernels.attend(queries, attended, pool, plan_.batch, attention_, plan_.items[item],
                               scratch_[thread]);
        if (plan_.gated_items.empty()) return;
        for (int i = plan_.gated_begin[item]; i < plan_.gated_begin[item + 1]; i++)
            if (index >= plan_.gated_items[i].first_layer)
                weights.kernels.attend(queries, attended, pool, plan_.gated, attention_,
                                       plan_.gated_items[i].item, scratch_[thread]);
    });
}

void Decoder::project(int index, const void* inputs, int rows, float* keys, float* values) {
    weights.check_complete();
    const pfx_shape& shape = weights.shape;
    check(index >= 0 && index < shape.num_layers,
          expected("layer", "0 to " + std::to_string(shape.num_layers - 1), index));
    check(rows >= 0, expected("rows", "0 or more", rows));
    check(rows == 0 || (inputs && keys && values), "expected inputs, keys and values, got NULL");
    if (rows == 0) return;
    const Packed& qkv = weights.layers[index].qkv;
    const void* operand = inputs;
    if (weights.element_size() != operand_size()) {
        float* wide = (float*)buffers_.normed.at_least((size_t)rows * shape.width * operand_size());
        weights.widen(inputs, (size_t)rows * shape.width, wide);
        operand = wide;
    }
    float* product = (float*)buffers_.qkv.at_least((size_t)rows * qkv.outputs * sizeof(float));
    multiply(operand, rows, qkv, Epilogue::store, product, qkv.outputs);
    const size_t heads = shape.num_heads * shape.head_dim, kv_heads = shape.num_kv_heads * shape.head_dim;
    for (int row = 0; row < rows; row++, product += qkv.outputs) {
        std::memcpy(keys + row * kv_heads, product + heads, kv_heads * sizeof(float));
        std::memcpy(values + row * kv_heads, product + heads + kv_heads, kv_heads * sizeof(float));
    }
}

// The rows of the outputs, copied together unless they are all rows.
Decoder::Rows Decoder::keep(const pfx_step& step) {
    float* x = (float*)buffers_.x.at_least(0);
    char* attended = (char*)buffers_.attended.at_least(0);
    if (plan_.keeps_all) return {x, attended, step.num_tokens};
    const size_t width = weights.shape.width, rows = step.num_outputs;
    const size_t bytes = weights.shape.num_heads * weights.shape.head_dim * operand_size();
    float* kept_x = (float*)buffers_.kept_x.at_least(rows * width * sizeof(float));
    char* kept_attended = (char*)buffers_.kept_attended.at_least(rows * bytes);
    for (size_t i = 0; i < rows; i++) {
        std::memcpy(kept_x + i * width, x + step.outputs[i] * width, width * sizeof(float));
        std::memcpy(kept_attended + i * bytes, attended + step.outputs[i] * bytes, bytes);
    }
    return {kept_x, kept_attended, (int)rows};
}

void Decoder::finish_layer(const Layer& layer, const Rows& rows) {
    const int width = weights.shape.width;
    multiply(rows.attended, rows.count, layer.o, Epilogue::add, rows.x, width);
    void* normed = buffers_.normed.at_least((size_t)rows.count * width * operand_size());
    norm(rows.x, layer.post_norm, normed, rows.count);
    if (layer.experts.experts.empty())
        run_mlp(layer.mlp, normed, rows.count, Epilogue::add, rows.x);
    else
        run_experts(layer.experts, normed, rows.x, rows.count);
}

void Decoder::run_mlp(const Mlp& mlp, const void* normed, int rows, Epilogue epilogue, float* out) {
    void* hidden = buffers_.hidden.at_least((size_t)rows * mlp.inner * operand_size());
    multiply(normed, rows, mlp.gate_up, Epilogue::gated, hidden, mlp.inner);
    multiply(hidden, rows, mlp.down, epilogue, out, weights.shape.width);
}

void Decoder::finish(const pfx_step& step, const Rows& rows) {
    void* normed = buffers_.normed.at_least((size_t)rows.count * weights.shape.width * operand_size());
    norm(rows.x, weights.final_norm, normed, rows.count);
    const size_t vocab = weights.shape.vocab;
    multiply(normed, rows.count, weights.head, Epilogue::store, step.logits, vocab);
    for_rows(rows.count, 1, [&](int row, int) {
        weights.kernels.largest(step.logits + row * vocab, step.candidates, step.best + row, step.best_value + row);
    });
}

}  // namespace pfx
