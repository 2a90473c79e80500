// A tiny decoder with random weights, the same on every machine, through the public interface.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <string>
#include <vector>

#include "prefixd_cpu.h"

// What the tests vary. Sizes are no multiples of a vector or a panel where the interface allows it.
struct Config {
    const char* name;
    int32_t layers, heads, kv_heads, head_dim, width, inner, vocab, embeddings, rotary_dim, block_size;
    bool biases, head_norms, tied;
    int32_t experts, experts_per_token;
    bool shared_expert;
};

inline const std::vector<Config> kConfigs = {
    {"grouped", 2, 6, 2, 16, 48, 80, 101, 101, 16, 16, false, false, true, 0, 0, false},
    {"biases", 2, 4, 4, 32, 72, 56, 67, 70, 32, 32, true, false, false, 0, 0, false},
    {"norms", 1, 8, 2, 64, 96, 200, 131, 131, 32, 16, false, true, true, 0, 0, false},
    {"experts", 2, 4, 2, 16, 64, 40, 59, 59, 16, 16, false, false, false, 4, 2, false},
    {"shared", 1, 4, 2, 16, 40, 24, 43, 43, 16, 16, true, false, false, 3, 1, true},
};

[[noreturn]] inline void fail(const std::string& what) {
    printf("FAILED: %s: %s\n", what.c_str(), pfx_error());
    exit(1);
}

inline void require(bool holds, const std::string& what) {
    if (!holds) fail(what);
}

// Numbers of a linear congruential generator, in [-scale, scale).
struct Random {
    uint64_t state;
    float next(float scale) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return ((int32_t)(state >> 40) - (1 << 23)) * (scale / (1 << 23));
    }
};

// An array of the decoder's dtype, of exactly its size, so that a sanitizer sees a read past its end.
class Array {
  public:
    Array() = default;
    Array(int32_t dtype, size_t count, Random& random, float scale, float mean = 0) : dtype_(dtype) {
        for (size_t i = 0; i < count; i++) {
            float value = mean + random.next(scale);
            uint32_t bits;
            memcpy(&bits, &value, 4);
            if (dtype == PFX_BF16) halves_.push_back((uint16_t)(bits >> 16));
            else floats_.push_back(value);
        }
        halves_.shrink_to_fit();
        floats_.shrink_to_fit();
    }
    const void* data() const {
        if (dtype_ == PFX_BF16) return halves_.empty() ? nullptr : halves_.data();
        return floats_.empty() ? nullptr : floats_.data();
    }

  private:
    int32_t dtype_ = PFX_F32;
    std::vector<float> floats_;
    std::vector<uint16_t> halves_;
};

class Model {
  public:
    Model(const Config& config, int32_t dtype, int32_t isa, bool int8)
        : config(config), dtype(dtype), int8(int8) {
        pfx_shape shape = {};
        shape.dtype = dtype;
        shape.num_layers = config.layers;
        shape.num_heads = config.heads;
        shape.num_kv_heads = config.kv_heads;
        shape.head_dim = config.head_dim;
        shape.width = config.width;
        shape.vocab = config.vocab;
        shape.embeddings = config.embeddings;
        shape.rotary_dim = config.rotary_dim;
        shape.max_positions = kPositions;
        shape.block_size = config.block_size;
        shape.norm_eps = 1e-5f;
        shape.attention_scale = 0.25f;
        decoder = pfx_new(&shape, isa);
        if (!decoder) fail("pfx_new");
        set_rotary();
        for (int32_t layer = 0; layer < config.layers; layer++) set_layer(layer);
        set_ends();
        require(pfx_set_pool(decoder, kBlocks) == 0, "pfx_set_pool");
    }
    ~Model() { pfx_free(decoder); }
    Model(const Model&) = delete;

    static constexpr int32_t kPositions = 256, kBlocks = 24;
    const Config config;
    const int32_t dtype;
    const bool int8;  // the layers' weights
    pfx_decoder* decoder;
    Random random{42};

  private:
    Array array(size_t count, float scale, float mean = 0) {
        return Array(dtype, count, random, scale, mean);
    }

    void set_rotary() {
        size_t count = (size_t)kPositions * config.rotary_dim / 2;
        std::vector<float> cosine(count), sine(count);
        for (size_t i = 0; i < count; i++) {
            float t = random.next(1);  // a rotation without a library's rounding: (1 - t²) / (1 + t²)
            cosine[i] = (1 - t * t) / (1 + t * t);
            sine[i] = 2 * t / (1 + t * t);
        }
        require(pfx_set_rotary(decoder, cosine.data(), sine.data()) == 0, "pfx_set_rotary");
    }

    void set_layer(int32_t index) {
        int32_t width = config.width, inner = config.inner;
        int32_t queries = config.heads * config.head_dim, keys = config.kv_heads * config.head_dim;
        std::vector<Array> held;
        held.reserve(32);  // their addresses stay
        auto keep = [&](size_t count, float scale, float mean = 0) {
            held.push_back(array(count, scale, mean));
            return held.back().data();
        };
        std::list<std::vector<int8_t>> codes;
        std::list<std::vector<float>> scales;
        auto weight = [&](size_t outputs, size_t inputs) {
            if (!int8) return pfx_linear{keep(outputs * inputs, 0.2f), nullptr, nullptr};
            codes.emplace_back(outputs * inputs);
            scales.emplace_back(outputs);
            for (int8_t& code : codes.back()) code = (int8_t)random.next(127.9f);
            for (float& scale : scales.back()) scale = (1.5f + random.next(0.5f)) * (0.2f / 127);
            return pfx_linear{codes.back().data(), nullptr, scales.back().data()};
        };
        auto linear = [&](int32_t outputs, int32_t inputs, bool bias) {
            pfx_linear linear = weight(outputs, inputs);
            linear.bias = bias ? keep(outputs, 0.2f) : nullptr;
            return linear;
        };
        pfx_layer layer = {};
        layer.input_norm = keep(width, 0.3f, 1);
        layer.post_norm = keep(width, 0.3f, 1);
        if (config.head_norms) {
            layer.q_norm = keep(config.head_dim, 0.3f, 1);
            layer.k_norm = keep(config.head_dim, 0.3f, 1);
        }
        layer.q = linear(queries, width, config.biases);
        layer.k = linear(keys, width, config.biases);
        layer.v = linear(keys, width, config.biases);
        layer.o = linear(width, queries, false);
        if (config.experts == 0 || config.shared_expert) {
            layer.inner = inner;
            layer.gate = linear(inner, width, false);
            layer.up = linear(inner, width, false);
            layer.down = linear(width, inner, false);
        }
        if (config.experts > 0) {
            size_t expert_inner = 24;
            layer.experts = config.experts;
            layer.experts_per_token = config.experts_per_token;
            layer.expert_inner = (int32_t)expert_inner;
            layer.normalize_weights = config.experts_per_token > 1;
            layer.router = keep((size_t)config.experts * width, 1);
            pfx_linear gate_up = weight(config.experts * 2 * expert_inner, width);
            pfx_linear down = weight((size_t)config.experts * width, expert_inner);
            layer.expert_gate_up = gate_up.weight;
            layer.expert_gate_up_scales = gate_up.scales;
            layer.expert_down = down.weight;
            layer.expert_down_scales = down.scales;
            if (config.shared_expert) layer.shared_gate = keep(width, 0.5f);
        }
        require(pfx_set_layer(decoder, index, &layer) == 0, "pfx_set_layer");
    }

    void set_ends() {
        Array norm = array(config.width, 0.3f, 1);
        Array head = array((size_t)config.vocab * config.width, 0.3f);
        Array embedding;
        if (!config.tied) embedding = array((size_t)config.embeddings * config.width, 1);
        pfx_linear linear = {head.data(), nullptr, nullptr};
        const void* table = config.tied ? nullptr : embedding.data();
        require(pfx_set_ends(decoder, norm.data(), &linear, table) == 0, "pfx_set_ends");
    }
};

// A batch: rows of tokens, each with its first position and block table, and a gated prefix: its rows (0:
// none), first layer and blocks.
struct Row {
    int32_t start;
    std::vector<int32_t> tokens, table;
    int32_t gated_count = 0, gated_layer = 0;
    std::vector<int32_t> gated_table = {};
};

struct Result {
    std::vector<int32_t> best;
    std::vector<float> best_value, logits;
};

// Runs the rows; the last token of each has an output. `inputs`: for tokens of id -1. `change`: of the step.
template <typename Change>
bool run(Model& model, const std::vector<Row>& rows, const void* inputs, Result& result, const Change& change) {
    std::vector<int32_t> ids, offsets, lengths, starts, tables, outputs, counts, layers, gated_tables;
    size_t table_width = 0, gated_width = 0;
    for (const Row& row : rows) {
        table_width = std::max(table_width, row.table.size());
        gated_width = std::max(gated_width, row.gated_table.size());
    }
    for (const Row& row : rows) {
        offsets.push_back((int32_t)ids.size());
        lengths.push_back((int32_t)row.tokens.size());
        starts.push_back(row.start);
        ids.insert(ids.end(), row.tokens.begin(), row.tokens.end());
        tables.insert(tables.end(), row.table.begin(), row.table.end());
        tables.resize(offsets.size() * table_width, 1 << 30);  // never read
        outputs.push_back((int32_t)ids.size() - 1);
        counts.push_back(row.gated_count);
        layers.push_back(row.gated_layer);
        gated_tables.insert(gated_tables.end(), row.gated_table.begin(), row.gated_table.end());
        gated_tables.resize(counts.size() * gated_width, 1 << 30);  // never read
    }
    gated_tables.shrink_to_fit();
    result.best.resize(rows.size());
    result.best_value.resize(rows.size());
    result.logits.resize(rows.size() * model.config.vocab);
    pfx_step step = {};
    step.num_tokens = (int32_t)ids.size();
    step.token_ids = ids.data();
    step.inputs = inputs;
    step.num_rows = (int32_t)rows.size();
    step.offsets = offsets.data();
    step.lengths = lengths.data();
    step.starts = starts.data();
    step.tables = tables.data();
    step.table_width = (int32_t)table_width;
    step.num_outputs = (int32_t)rows.size();
    step.outputs = outputs.data();
    step.logits = result.logits.data();
    step.best = result.best.data();
    step.best_value = result.best_value.data();
    step.candidates = model.config.vocab - 1;
    if (gated_width > 0) {
        step.gated_counts = counts.data();
        step.gated_layers = layers.data();
        step.gated_tables = gated_tables.data();
        step.gated_width = (int32_t)gated_width;
    }
    change(step);
    return pfx_run(model.decoder, &step) == 0;
}

inline Result run(Model& model, const std::vector<Row>& rows, const void* inputs = nullptr) {
    Result result;
    require(run(model, rows, inputs, result, [](pfx_step&) {}), "pfx_run");
    return result;
}
