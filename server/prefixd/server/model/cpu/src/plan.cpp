#include "plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "pool.h"

namespace pfx {

namespace {

constexpr int kSharedPositions = 32;  // fewer are not worth reading together
constexpr int kItemsPerThread = 4;    // at least, where rows are grouped

int blocks_of(const Batch& batch, int row, int block_size) {
    return (batch.starts[row] + batch.lengths[row] + block_size - 1) / block_size;
}

}  // namespace

void Plan::fill(const pfx_step& step, const AttentionShape& shape, int threads) {
    row_of_.resize(step.num_tokens);
    position_of_.resize(step.num_tokens);
    for (int row = 0; row < step.num_rows; row++)
        for (int i = 0; i < step.lengths[row]; i++) {
            row_of_[step.offsets[row] + i] = row;
            position_of_[step.offsets[row] + i] = step.starts[row] + i;
        }
    batch = {step.offsets, step.lengths, step.starts, step.tables, step.table_width, step.num_rows,
             row_of_.data(), position_of_.data()};
    gated = batch;
    gated.tables = step.gated_tables;
    gated.table_width = step.gated_width;
    gated.counts = step.gated_counts;
    input_of.resize(step.num_tokens);
    for (int i = 0, next = 0; i < step.num_tokens; i++) input_of[i] = step.token_ids[i] == -1 ? next++ : -1;
    keeps_all = step.num_outputs == step.num_tokens;
    for (int i = 0; keeps_all && i < step.num_outputs; i++) keeps_all = step.outputs[i] == i;
    add_items(step, shape, threads);
    order_items(threads);
    add_gated(step);
}

// The number of leading blocks that two rows have in common.
int Plan::shared_blocks(int row, int other, int block_size) const {
    const int32_t* a = batch.tables + (size_t)row * batch.table_width;
    const int32_t* b = batch.tables + (size_t)other * batch.table_width;
    const int end = std::min(blocks_of(batch, row, block_size), blocks_of(batch, other, block_size));
    return std::mismatch(a, a + end, b).first - a;
}

void Plan::add_items(const pfx_step& step, const AttentionShape& shape, int threads) {
    const int group = shape.num_heads / shape.num_kv_heads;
    const int item_queries = std::max(1, kItemQueries / group);
    unordered_.clear();
    costs_.clear();
    order_.resize(step.num_rows);
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(), [&](int a, int b) {
        if (step.lengths[a] != step.lengths[b]) return step.lengths[a] < step.lengths[b];
        const int shared = shared_blocks(a, b, shape.block_size);
        const int end_a = blocks_of(batch, a, shape.block_size), end_b = blocks_of(batch, b, shape.block_size);
        if (shared == end_a || shared == end_b) return end_a != end_b ? end_a < end_b : a < b;
        return batch.tables[(size_t)a * batch.table_width + shared] <
               batch.tables[(size_t)b * batch.table_width + shared];
    });
    const int all = step.num_rows * shape.num_kv_heads;
    const int busy = threads == 1 ? all : all / (threads * kItemsPerThread);
    for (size_t begin = 0; begin < order_.size();) {
        const int length = step.lengths[order_[begin]];
        int shared = 0;
        const int end = group_end(begin, std::min(busy, item_queries / length), shape, &shared);
        const int rows = end - (int)begin;
        const int queries = rows > 1 ? length : item_queries;
        for (int first = 0; first < length; first += queries)
            for (int head = 0; head < shape.num_kv_heads; head++)
                add_item({&order_[begin], rows, shared, head, first, std::min(length, first + queries),
                          nullptr}, shape);
        begin = end;
    }
}

// Rows order_[begin .. end) that are attended together, and the blocks they share.
int Plan::group_end(size_t begin, int largest_group, const AttentionShape& shape, int* shared) const {
    size_t end = begin + 1;
    const int first = order_[begin];
    for (; end < order_.size() && (int)(end - begin) < largest_group; end++) {
        if (batch.lengths[order_[end]] != batch.lengths[first]) break;
        const int common = shared_blocks(first, order_[end], shape.block_size);
        if (common * shape.block_size < kSharedPositions || common < *shared * 3 / 4) break;
        *shared = *shared ? std::min(*shared, common) : common;
    }
    return end;
}

void Plan::add_item(const AttentionItem& item, const AttentionShape& shape) {
    int64_t positions = item.shared * shape.block_size;
    for (int i = 0; i < item.num_rows; i++) {
        positions += batch.starts[item.rows[i]] + item.last_query - item.shared * shape.block_size;
        if (gated.counts) positions += gated.counts[item.rows[i]];
    }
    unordered_.push_back(item);
    costs_.push_back((positions + 64) * (item.last_query - item.first_query));
}

// Each thread's share begins with its largest items, and other threads take from its end.
void Plan::order_items(int threads) {
    const int count = unordered_.size();
    by_cost_.resize(count);
    std::iota(by_cost_.begin(), by_cost_.end(), 0);
    std::stable_sort(by_cost_.begin(), by_cost_.end(), [&](int a, int b) { return costs_[a] > costs_[b]; });
    items.resize(count);
    filled_.assign(threads, 0);
    for (int i = 0, thread = 0; i < count; thread = (thread + 1) % threads) {
        const int first = ThreadPool::share_begin(count, thread, threads);
        const int last = ThreadPool::share_begin(count, thread + 1, threads);
        if (first + filled_[thread] < last) items[first + filled_[thread]++] = unordered_[by_cost_[i++]];
    }
    for (int i = 0; i + 1 < count; i++) items[i].next = &items[i + 1];
}

// The thread of an item adds the gated prefixes of its rows.
void Plan::add_gated(const pfx_step& step) {
    gated_items.clear();
    gated_begin.clear();
    if (!gated.counts) return;
    for (const AttentionItem& item : items) {
        gated_begin.push_back(gated_items.size());
        for (int i = 0; i < item.num_rows; i++) {
            const int32_t* row = item.rows + i;
            if (gated.counts[*row] > 0)
                gated_items.push_back({{row, 1, 0, item.head, item.first_query, item.last_query, nullptr},
                                        step.gated_layers[*row]});
        }
    }
    gated_begin.push_back(gated_items.size());
}

}  // namespace pfx
