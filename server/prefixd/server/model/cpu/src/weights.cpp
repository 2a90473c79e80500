#include <cstring>
#include <stdexcept>

#include "model.h"

namespace pfx {

static float widened(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

Weights::Weights(const pfx_shape& shape, const Kernels& kernels)
    : shape(shape), kernels(kernels), layers(shape.num_layers) {}

size_t Weights::panel_bytes(int inner) const {
    const size_t group = shape.dtype == PFX_BF16 ? 2 : 1;
    return (inner + group - 1) / group * group * kernels.panel_columns * element_size();
}

void Weights::widen(const void* source, size_t count, float* out) const {
    if (shape.dtype == PFX_F32)
        std::memcpy(out, source, count * sizeof(float));
    else
        for (size_t i = 0; i < count; i++) out[i] = widened(static_cast<const bf16*>(source)[i]);
}

const float* Weights::floats(const void* source, size_t count) {
    float* copy = static_cast<float*>(arena.take(count * sizeof(float)));
    widen(source, count, copy);
    return copy;
}

Packed Weights::allocate(int panels, int outputs, int inner, bool biased) {
    Packed packed;
    packed.data = arena.take(panels * panel_bytes(inner));
    if (biased) packed.bias = static_cast<float*>(arena.take(panels * kernels.panel_columns * sizeof(float)));
    packed.outputs = outputs;
    packed.inner = inner;
    packed.panels = panels;
    return packed;
}

Packed Weights::pack(const std::vector<Part>& parts, int inner, ThreadPool& pool) {
    int outputs = 0;
    bool biased = false;
    for (const Part& part : parts) {
        outputs += part.outputs;
        biased |= part.bias != nullptr;
    }
    const int columns = kernels.panel_columns;
    Packed packed = allocate((outputs + columns - 1) / columns, outputs, inner, biased);
    const void* rows = parts[0].weight;
    std::vector<char> merged;
    if (parts.size() > 1) {
        const size_t row = inner * element_size();
        for (const Part& part : parts) {
            const char* from = static_cast<const char*>(part.weight);
            merged.insert(merged.end(), from, from + part.outputs * row);
        }
        rows = merged.data();
    }
    pool.run(packed.panels, [&](int panel, int) {
        kernels.pack(rows, outputs, inner, packed.data, panel, panel + 1);
    });
    float* bias = const_cast<float*>(packed.bias);
    for (const Part& part : parts) {
        if (part.bias) widen(part.bias, part.outputs, bias);
        if (bias) bias += part.outputs;
    }
    return packed;
}

Packed Weights::pack_pair(const Part& gate, const Part& up, int inner, ThreadPool& pool) {
    const int columns = kernels.panel_columns, pairs = (gate.outputs + columns - 1) / columns;
    const size_t bytes = panel_bytes(inner);
    Packed packed = allocate(2 * pairs, 2 * gate.outputs, inner, gate.bias || up.bias);
    float* bias = const_cast<float*>(packed.bias);
    for (int half = 0; half < 2; half++) {
        const Part& part = half ? up : gate;
        pool.run(pairs, [&](int pair, int) {
            // The kernel fills panel `pair` of its output; here it is the panel 2 * pair + half.
            char* out = static_cast<char*>(packed.data) + (pair + half) * bytes;
            kernels.pack(part.weight, part.outputs, inner, out, pair, pair + 1);
        });
        for (int i = 0; part.bias && i < part.outputs; i++) {
            const char* from = static_cast<const char*>(part.bias) + i * element_size();
            widen(from, 1, bias + (2 * (i / columns) + half) * columns + i % columns);
        }
    }
    return packed;
}

Mlp Weights::pack_mlp(const Part& gate, const Part& up, const pfx_linear& down, int inner,
                      ThreadPool& pool) {
    return {pack_pair(gate, up, shape.width, pool),
            pack({{down.weight, down.bias, shape.width}}, inner, pool), inner};
}

Experts Weights::pack_experts(const pfx_layer& given, ThreadPool& pool) {
    const int width = shape.width, inner = given.expert_inner;
    check(given.experts_per_token >= 1 && given.experts_per_token <= given.experts,
          expected("experts_per_token", "1 to " + std::to_string(given.experts), given.experts_per_token));
    check(inner >= 1, expected("expert_inner", "at least 1", inner));
    check(given.router && given.expert_gate_up && given.expert_down,
          "expected router, expert_gate_up and expert_down, got NULL");
    Experts packed;
    packed.per_token = given.experts_per_token;
    packed.normalize_weights = given.normalize_weights;
    packed.router = pack({{given.router, nullptr, given.experts}}, width, pool);
    const size_t half = (size_t)inner * width * element_size();
    for (int i = 0; i < given.experts; i++) {
        const char* gate = static_cast<const char*>(given.expert_gate_up) + 2 * half * i;
        const pfx_linear down = {static_cast<const char*>(given.expert_down) + half * i, nullptr, nullptr};
        packed.experts.push_back(
            pack_mlp({gate, nullptr, inner}, {gate + half, nullptr, inner}, down, inner, pool));
    }
    packed.has_shared = given.shared_gate != nullptr;
    if (packed.has_shared) packed.shared_gate = pack({{given.shared_gate, nullptr, 1}}, width, pool);
    return packed;
}

void Weights::set_rotary(const float* cosine_, const float* sine_) {
    check(cosine_ && sine_, "expected cosine and sine, got NULL");
    check(!cosine, "expected the rotary tables once, got them again");
    const size_t count = (size_t)shape.max_positions * (shape.rotary_dim / 2);
    cosine = static_cast<float*>(std::memcpy(arena.take(count * sizeof(float)), cosine_, count * sizeof(float)));
    sine = static_cast<float*>(std::memcpy(arena.take(count * sizeof(float)), sine_, count * sizeof(float)));
}

void Weights::set_layer(int index, const pfx_layer& given, ThreadPool& pool) {
    check(index >= 0 && index < shape.num_layers,
          expected("layer", "0 to " + std::to_string(shape.num_layers - 1), index));
    check(!layers[index].is_set, expected("layer", "each layer once, got again", index));
    check(given.input_norm && given.post_norm && given.q.weight && given.k.weight && given.v.weight &&
              given.o.weight,
          "expected input_norm, post_norm, q, k, v and o, got NULL");
    for (const pfx_linear* linear : {&given.q, &given.k, &given.v, &given.o, &given.gate, &given.up, &given.down})
        check(!linear->scales, "these kernels have no int8 products: expected scales NULL, got an address");
    check(!given.expert_gate_up_scales && !given.expert_down_scales,
          "these kernels have no int8 products: expected scales of experts NULL, got an address");
    const bool dense = given.gate.weight && given.up.weight && given.down.weight;
    check(given.experts >= 0, expected("experts", "0 or more", given.experts));
    check(dense || given.experts > 0, "expected gate, up and down or experts, got NULL");
    check(!dense || given.experts == 0 || given.shared_gate,
          "expected shared_gate with gate, up and down of a shared expert, got NULL");
    check(!given.shared_gate || dense, "expected gate, up and down of the shared expert, got NULL");
    check(!dense || given.inner >= 1, expected("inner", "at least 1", given.inner));
    Layer layer;
    const int width = shape.width, heads = shape.num_heads * shape.head_dim;
    const int kv_heads = shape.num_kv_heads * shape.head_dim;
    layer.input_norm = floats(given.input_norm, width);
    layer.post_norm = floats(given.post_norm, width);
    if (given.q_norm) layer.q_norm = floats(given.q_norm, shape.head_dim);
    if (given.k_norm) layer.k_norm = floats(given.k_norm, shape.head_dim);
    layer.qkv = pack({{given.q.weight, given.q.bias, heads},
                      {given.k.weight, given.k.bias, kv_heads},
                      {given.v.weight, given.v.bias, kv_heads}}, width, pool);
    layer.o = pack({{given.o.weight, given.o.bias, width}}, heads, pool);
    if (given.experts > 0) layer.experts = pack_experts(given, pool);
    if (dense) {
        Mlp& mlp = given.experts > 0 ? layer.experts.shared : layer.mlp;
        mlp = pack_mlp({given.gate.weight, given.gate.bias, given.inner},
                       {given.up.weight, given.up.bias, given.inner}, given.down, given.inner, pool);
    }
    layer.is_set = true;
    layers[index] = std::move(layer);
}

void Weights::set_ends(const void* norm, const pfx_linear& given, const void* embedding, ThreadPool& pool) {
    check(norm && given.weight, "expected final_norm and head, got NULL");
    check(!given.scales, "head: expected scales NULL, got an address");
    check(!final_norm, "expected the head once, got it again");
    check(embedding || shape.embeddings <= shape.vocab,
          expected("embeddings", "at most the head's " + std::to_string(shape.vocab) +
                   " rows where embedding is NULL", shape.embeddings));
    head = pack({{given.weight, given.bias, shape.vocab}}, shape.width, pool);
    if (embedding) {
        const size_t bytes = (size_t)shape.embeddings * shape.width * element_size();
        embedding_ = std::memcpy(arena.take(bytes), embedding, bytes);
    }
    final_norm = floats(norm, shape.width);
}

void Weights::check_complete() const {
    check(cosine, "expected pfx_set_rotary before, got none");
    check(final_norm, "expected pfx_set_ends before, got none");
    for (size_t i = 0; i < layers.size(); i++)
        check(layers[i].is_set, "expected pfx_set_layer of layer " + std::to_string(i) + " before, got none");
}

void Weights::read_embedding(int id, float* out) const {
    if (embedding_)
        widen(static_cast<const char*>(embedding_) + (size_t)id * shape.width * element_size(), shape.width, out);
    else
        kernels.unpack_row(head, id, out);
}

}  // namespace pfx
