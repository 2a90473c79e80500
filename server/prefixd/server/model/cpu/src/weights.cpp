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

size_t Weights::panel_bytes(int inner, bool is_int8) const {
    const size_t group = sizeof(float) / (is_int8 ? 1 : element_size());
    return (inner + group - 1) / group * sizeof(float) * kernels.panel_columns;
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

Packed Weights::allocate(int panels, int outputs, int inner, bool biased, bool scaled) {
    Packed packed;
    const size_t columns = (size_t)panels * kernels.panel_columns;
    packed.data = arena.take(panels * panel_bytes(inner, scaled));
    if (biased) packed.bias = static_cast<float*>(arena.take(columns * sizeof(float)));
    if (scaled) packed.scales = static_cast<float*>(arena.take(columns * sizeof(float)));
    packed.outputs = outputs;
    packed.inner = inner;
    packed.panels = panels;
    return packed;
}

template <typename Place>
void Weights::copy_columns(const Part& part, const Packed& packed, const Place& place) {
    float *bias = const_cast<float*>(packed.bias), *scales = const_cast<float*>(packed.scales);
    for (int i = 0; i < part.outputs; i++) {
        if (part.linear.bias)
            widen(static_cast<const char*>(part.linear.bias) + i * element_size(), 1, bias + place(i));
        if (scales) scales[place(i)] = part.linear.scales[i];
    }
}

Packed Weights::pack(const std::vector<Part>& parts, int inner, ThreadPool& pool) {
    int outputs = 0;
    bool biased = false;
    for (const Part& part : parts) {
        outputs += part.outputs;
        biased |= part.linear.bias != nullptr;
    }
    const int columns = kernels.panel_columns;
    const bool scaled = parts[0].linear.scales;
    Packed packed = allocate((outputs + columns - 1) / columns, outputs, inner, biased, scaled);
    const void* rows = parts[0].linear.weight;
    std::vector<char> merged;
    if (parts.size() > 1) {
        const size_t row = inner * (scaled ? 1 : element_size());
        for (const Part& part : parts) {
            const char* from = static_cast<const char*>(part.linear.weight);
            merged.insert(merged.end(), from, from + part.outputs * row);
        }
        rows = merged.data();
    }
    const auto pack_panels = scaled ? kernels.int8.pack : kernels.pack;
    pool.run(packed.panels, [&](int panel, int) {
        pack_panels(rows, outputs, inner, packed.data, panel, panel + 1);
    });
    int first = 0;
    for (const Part& part : parts) {
        copy_columns(part, packed, [&](int i) { return first + i; });
        first += part.outputs;
    }
    return packed;
}

Packed Weights::pack_pair(const Part& gate, const Part& up, int inner, ThreadPool& pool) {
    const int columns = kernels.panel_columns, pairs = (gate.outputs + columns - 1) / columns;
    const bool scaled = gate.linear.scales, biased = gate.linear.bias || up.linear.bias;
    const size_t bytes = panel_bytes(inner, scaled);
    const auto pack_panels = scaled ? kernels.int8.pack : kernels.pack;
    Packed packed = allocate(2 * pairs, 2 * gate.outputs, inner, biased, scaled);
    for (int half = 0; half < 2; half++) {
        const Part& part = half ? up : gate;
        pool.run(pairs, [&](int pair, int) {
            // The kernel fills panel `pair` of its output; here it is the panel 2 * pair + half.
            char* out = static_cast<char*>(packed.data) + (pair + half) * bytes;
            pack_panels(part.linear.weight, part.outputs, inner, out, pair, pair + 1);
        });
        copy_columns(part, packed, [&](int i) { return (2 * (i / columns) + half) * columns + i % columns; });
    }
    return packed;
}

Mlp Weights::pack_mlp(const pfx_linear& gate, const pfx_linear& up, const pfx_linear& down, int inner,
                      ThreadPool& pool) {
    return {pack_pair({gate, inner}, {up, inner}, shape.width, pool), pack({{down, shape.width}}, inner, pool), inner};
}

// A matrix of experts from row `first` on.
static pfx_linear part_of(const void* weight, const float* scales, size_t first, size_t row_bytes) {
    return {static_cast<const char*>(weight) + first * row_bytes, nullptr, scales ? scales + first : nullptr};
}

Experts Weights::pack_experts(const pfx_layer& given, ThreadPool& pool) {
    const int width = shape.width, inner = given.expert_inner;
    check(given.experts_per_token >= 1 && given.experts_per_token <= given.experts,
          expected("experts_per_token", "1 to " + std::to_string(given.experts), given.experts_per_token));
    check(inner >= 1, expected("expert_inner", "at least 1", inner));
    check(given.router && given.expert_gate_up && given.expert_down,
          "expected router, expert_gate_up and expert_down, got NULL");
    const float *gate_up_scales = given.expert_gate_up_scales, *down_scales = given.expert_down_scales;
    const size_t experts = given.experts;
    if (gate_up_scales) check_int8("expert_gate_up", given.expert_gate_up, gate_up_scales, experts * 2 * inner, width);
    if (down_scales) check_int8("expert_down", given.expert_down, down_scales, experts * width, inner);
    Experts packed;
    packed.per_token = given.experts_per_token;
    packed.normalize_weights = given.normalize_weights;
    packed.router = pack({{{given.router, nullptr, nullptr}, given.experts}}, width, pool);
    const size_t gate_up_bytes = width * (gate_up_scales ? 1 : element_size());
    const size_t down_bytes = inner * (down_scales ? 1 : element_size());
    for (size_t i = 0; i < experts; i++) {
        const pfx_linear gate = part_of(given.expert_gate_up, gate_up_scales, 2 * i * inner, gate_up_bytes);
        const pfx_linear up = part_of(given.expert_gate_up, gate_up_scales, (2 * i + 1) * inner, gate_up_bytes);
        const pfx_linear down = part_of(given.expert_down, down_scales, i * width, down_bytes);
        packed.experts.push_back(pack_mlp(gate, up, down, inner, pool));
    }
    packed.has_shared = given.shared_gate != nullptr;
    if (packed.has_shared) packed.shared_gate = pack({{{given.shared_gate, nullptr, nullptr}, 1}}, width, pool);
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
    const bool dense = given.gate.weight && given.up.weight && given.down.weight;
    check(given.experts >= 0, expected("experts", "0 or more", given.experts));
    check(dense || given.experts > 0, "expected gate, up and down or experts, got NULL");
    check(!dense || given.experts == 0 || given.shared_gate,
          "expected shared_gate with gate, up and down of a shared expert, got NULL");
    check(!given.shared_gate || dense, "expected gate, up and down of the shared expert, got NULL");
    check(!dense || given.inner >= 1, expected("inner", "at least 1", given.inner));
    check_int8_layer(given, shape);
    Layer layer;
    const int width = shape.width, heads = shape.num_heads * shape.head_dim;
    const int kv_heads = shape.num_kv_heads * shape.head_dim;
    layer.input_norm = floats(given.input_norm, width);
    layer.post_norm = floats(given.post_norm, width);
    if (given.q_norm) layer.q_norm = floats(given.q_norm, shape.head_dim);
    if (given.k_norm) layer.k_norm = floats(given.k_norm, shape.head_dim);
    layer.qkv = pack({{given.q, heads}, {given.k, kv_heads}, {given.v, kv_heads}}, width, pool);
    layer.o = pack({{given.o, width}}, heads, pool);
    if (given.experts > 0) layer.experts = pack_experts(given, pool);
    if (dense) {
        Mlp& mlp = given.experts > 0 ? layer.experts.shared : layer.mlp;
        mlp = pack_mlp(given.gate, given.up, given.down, given.inner, pool);
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
    head = pack({{given, shape.vocab}}, shape.width, pool);
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
