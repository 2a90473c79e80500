// A decoder: weights, KV pool, threads, and the phases of a step.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>

#include "model.h"
#include "plan.h"
#include "pool.h"

namespace pfx {

class Decoder {
public:
    Decoder(const pfx_shape& shape, const Kernels& kernels);

    void set_threads(int threads, int spin_us);
    void set_pool(int num_blocks);
    void run(const pfx_step& step);
    void project(int layer, const void* inputs, int rows, float* keys, float* values);
    void zero_blocks(const int32_t* blocks, int count);
    void copy_blocks(const int32_t* sources, const int32_t* targets, int count);
    void write_kv(const int32_t* table, int start, int count, const void* kv);
    void read_kv(const int32_t* table, int start, int count, void* kv) const;
    void read_embeddings(const int32_t* ids, int count, void* out) const;
    int64_t num_bytes() const;

    Weights weights;
    std::unique_ptr<ThreadPool> threads;
    pfx_counters counters = {};

private:
    // What the layers of one step read and write; rows are tokens.
    struct Activations {
        Buffer x, normed, rounded, qkv, queries, attended, hidden, kept_x, kept_attended;
        Buffer router, chosen, chosen_weights, expert_rows, gathered, expert_hidden, expert_out, shared_out, shared_gate;
    };

    // What the part of a layer after attention works on: all tokens, or those of the outputs.
    struct Rows {
        float* x;
        void* attended;
        int count;
    };

    // The rows that a product reads.
    struct Inputs {
        const void* rows;
        size_t row_bytes;
        const void* row(size_t index) const { return static_cast<const char*>(rows) + index * row_bytes; }
    };

    void run_phases(const pfx_step& step);
    void embed(const pfx_step& step);
    void attend(const Layer& layer, int index, int num_tokens);
    Rows keep(const pfx_step& step);
    void finish_layer(const Layer& layer, const Rows& rows);
    void finish(const pfx_step& step, const Rows& rows);

    void run_mlp(const Mlp& mlp, const void* normed, int rows, Epilogue epilogue, float* out);
    void run_experts(const Experts& experts, const void* normed, float* x, int rows);
    void choose_experts(const Experts& experts, const float* scores, int rows);
    // Rows first .. first + count of the gathered operands, which go through one expert.
    struct ExpertRows {
        int expert, first, count;
    };
    std::vector<ExpertRows> gather(const Experts& experts, const Inputs& inputs, int rows);
    void multiply_experts(const Experts& experts, const std::vector<ExpertRows>& active, int places,
                          size_t row_bytes);
    void add_experts(const Experts& experts, float* x, int rows);
    Inputs inputs_of(const Packed& weights, const void* operand, int rows);
    // The kernel that multiplies with some weights.
    auto multiply_of(const Packed& packed) const {
        return packed.scales ? weights.kernels.int8.multiply : weights.kernels.multiply;
    }
    void multiply(const void* operand, int rows, const Packed& weights, Epilogue epilogue, void* out, int ldo);
    void norm(const float* x, const float* weight, void* out, int rows);
    // work(first, last) for ranges of at most `at_once` rows.
    template <typename Work>
    void for_rows(int rows, int at_once, const Work& work) {
        at_once = std::max(1, at_once);
        threads->run((rows + at_once - 1) / at_once, [&](int item, int) {
            work(item * at_once, std::min(rows, (item + 1) * at_once));
        });
    }

    size_t operand_size() const { return weights.kernels.bf16_operands ? 2 : 4; }
    size_t block_elements() const;
    Pool pool_of(int layer) const;
    void check_table(const int32_t* table, int start, int count) const;
    void check_blocks(const char* name, const int32_t* blocks, int count) const;

    AttentionShape attention_;
    Plan plan_;
    Activations buffers_;
    std::unique_ptr<Mapping> kv_;
    int num_blocks_ = 0;
    std::vector<Scratch> scratch_;
};

}  // namespace pfx
