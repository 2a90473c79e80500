// What a step computes, the same for all layers.
#pragma once
#include <vector>

#include "kernels.h"
#include "prefixd_cpu.h"

namespace pfx {

// A row of an item that has a gated prefix, from a layer on.
struct GatedItem {
    AttentionItem item;
    int first_layer;
};

struct Plan {
    Batch batch;
    Batch gated;                       // the same rows with their gated prefixes
    std::vector<AttentionItem> items;  // in the order in which ThreadPool divides them
    std::vector<GatedItem> gated_items;  // those of items[i] from gated_begin[i] to [i + 1]
    std::vector<int> gated_begin;
    std::vector<int32_t> input_of;     // [num_tokens] the row of `inputs` of a token of id -1
    bool keeps_all = false;            // the outputs are all tokens, in their order

    void fill(const pfx_step& step, const AttentionShape& shape, int threads);

private:
    void add_items(const pfx_step& step, const AttentionShape& shape, int threads);
    void add_item(const AttentionItem& item, const AttentionShape& shape);
    int group_end(size_t begin, int largest_group, const AttentionShape& shape, int* shared) const;
    int shared_blocks(int row, int other, int block_size) const;
    void order_items(int threads);
    void add_gated(const pfx_step& step);

    std::vector<int32_t> row_of_, position_of_;
    std::vector<int32_t> order_;  // rows; those that share the start of their tables are adjacent
    std::vector<AttentionItem> unordered_;
    std::vector<int64_t> costs_;
    std::vector<int> by_cost_, filled_;
};

// Throws std::invalid_argument for a step that the decoder cannot run.
void check_step(const pfx_step& step, const pfx_shape& shape, int num_blocks);

}  // namespace pfx
