// The weights of a decoder, packed.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "pool.h"
#include "prefixd_cpu.h"

namespace pfx {

// A gated MLP, silu(gate) * up then down; panels of gate and up alternate.
struct Mlp {
    Packed gate_up, down;
    int inner = 0;
};

struct Experts {
    Packed router;
    std::vector<Mlp> experts;
    int per_token = 0;
    bool normalize_weights = false;
    bool has_shared = false;
    Mlp shared;
    Packed shared_gate;
};

struct Layer {
    bool is_set = false;
    const float *input_norm, *post_norm, *q_norm = nullptr, *k_norm = nullptr;
    Packed qkv, o;
    Mlp mlp;          // where there are no experts
    Experts experts;  // experts.experts is empty in a dense layer
};

// Packs weights in memory of its own. Every weight is given once.
class Weights {
public:
    Weights(const pfx_shape& shape, const Kernels& kernels);
    // These throw std::invalid_argument.
    void set_rotary(const float* cosine, const float* sine);
    void set_layer(int index, const pfx_layer& given, ThreadPool& pool);
    void set_ends(const void* final_norm, const pfx_linear& head, const void* embedding, ThreadPool& pool);
    void check_complete() const;

    // The embedding of a token, as float32 [width].
    void read_embedding(int id, float* out) const;
    // `count` values of the weight type as float32.
    void widen(const void* source, size_t count, float* out) const;
    size_t element_size() const { return shape.dtype == PFX_BF16 ? 2 : 4; }

    const pfx_shape shape;
    const Kernels& kernels;
    std::vector<Layer> layers;
    const float *cosine = nullptr, *sine = nullptr, *final_norm = nullptr;
    Packed head;
    Arena arena;

private:
    // Rows of one matrix after another.
    struct Part {
        pfx_linear linear;
        int outputs;
    };
    Packed pack(const std::vector<Part>& parts, int inner, ThreadPool& pool);
    Packed pack_pair(const Part& gate, const Part& up, int inner, ThreadPool& pool);
    Packed allocate(int panels, int outputs, int inner, bool biased, bool scaled);
    // Bias and scales of a part; output i is the column place(i) of all panels.
    template <typename Place>
    void copy_columns(const Part& part, const Packed& packed, const Place& place);
    Mlp pack_mlp(const pfx_linear& gate, const pfx_linear& up, const pfx_linear& down, int inner, ThreadPool& pool);
    Experts pack_experts(const pfx_layer& given, ThreadPool& pool);
    const float* floats(const void* source, size_t count);
    size_t panel_bytes(int inner, bool is_int8) const;

    const void* embedding_ = nullptr;  // [embeddings, width] of the weight type, or null
};

void check(bool holds, const std::string& message);  // throws std::invalid_argument

// "NAME: expected EXPECTED, got VALUE"
std::string expected(const std::string& name, const std::string& what, long long value);

// Throws std::invalid_argument for weights [rows, inner] in int8, or scales [rows], that no product takes.
void check_int8(const std::string& name, const void* weight, const float* scales, size_t rows, int inner);

// Throws std::invalid_argument for the scales and int8 weights of a layer, other than of its experts.
void check_int8_layer(const pfx_layer& layer, const pfx_shape& shape);

// Throws std::invalid_argument for sizes that no decoder has.
void check_shape(const pfx_shape& shape);

}  // namespace pfx
