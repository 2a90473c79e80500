// A layer of experts: each token goes through a few of them, and perhaps a shared one.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "decoder.h"

namespace pfx {

// The experts of each token and their weights: softmax over all, then the largest, the lower index
// first among equals.
void Decoder::choose_experts(const Experts& experts, const float* scores, int rows) {
    const int count = experts.experts.size(), per_token = experts.per_token;
    int32_t* chosen = (int32_t*)buffers_.chosen.at_least((size_t)rows * per_token * sizeof(int32_t));
    float* chosen_weights = (float*)buffers_.chosen_weights.at_least((size_t)rows * per_token * sizeof(float));
    std::vector<float> shares(count);
    std::vector<int32_t> order(count);
    for (int row = 0; row < rows; row++) {
        const float* of_row = scores + (size_t)row * count;
        const float largest = *std::max_element(of_row, of_row + count);
        float total = 0;
        for (int i = 0; i < count; i++) total += shares[i] = std::exp(of_row[i] - largest);
        std::iota(order.begin(), order.end(), 0);
        // Of a row with NaN any experts do; the order must be one all the same.
        auto before = [&](int a, int b) {
            const bool nan_a = std::isnan(shares[a]), nan_b = std::isnan(shares[b]);
            if (nan_a || nan_b) return nan_a != nan_b ? nan_a : a < b;
            return shares[a] != shares[b] ? shares[a] > shares[b] : a < b;
        };
        std::partial_sort(order.begin(), order.begin() + per_token, order.end(), before);
        float sum = 0;
        for (int i = 0; i < per_token; i++) sum += shares[order[i]];
        for (int i = 0; i < per_token; i++) {
            chosen[(size_t)row * per_token + i] = order[i];
            chosen_weights[(size_t)row * per_token + i] =
                shares[order[i]] / (experts.normalize_weights ? sum : total);
        }
    }
}

// Copies the inputs of each token once for each of its experts, those of an expert together.
std::vector<Decoder::ExpertRows> Decoder::gather(const Experts& experts, const Inputs& inputs, int rows) {
    const int count = experts.experts.size(), places = rows * experts.per_token;
    const int32_t* chosen = (const int32_t*)buffers_.chosen.at_least(0);
    int32_t* place_of = (int32_t*)buffers_.expert_rows.at_least(places * sizeof(int32_t));
    std::vector<int> begin(count + 1);
    for (int i = 0; i < places; i++) begin[chosen[i] + 1]++;
    std::vector<ExpertRows> active;
    for (int i = 0; i < count; i++) {
        if (begin[i + 1]) active.push_back({i, begin[i], begin[i + 1]});
        begin[i + 1] += begin[i];
    }
    char* gathered = (char*)buffers_.gathered.at_least(places * inputs.row_bytes);
    for (int i = 0; i < places; i++) {
        place_of[i] = begin[chosen[i]]++;
        const void* from = inputs.row(i / experts.per_token);
        std::memcpy(gathered + place_of[i] * inputs.row_bytes, from, inputs.row_bytes);
    }
    return active;
}

// `row_bytes`: of the gathered inputs.
void Decoder::multiply_experts(const Experts& experts, const std::vector<ExpertRows>& active, int places,
                               size_t row_bytes) {
    const int width = weights.shape.width, inner = experts.experts[0].inner;
    const Inputs gathered = {buffers_.gathered.at_least(0), row_bytes};
    char* hidden = (char*)buffers_.expert_hidden.at_least((size_t)places * inner * operand_size());
    float* out = (float*)buffers_.expert_out.at_least((size_t)places * width * sizeof(float));
    const int pairs = experts.experts[0].gate_up.panels / 2, panels = experts.experts[0].down.panels;
    threads->run((int)active.size() * pairs, [&](int item, int) {
        const ExpertRows& of = active[item / pairs];
        const size_t first = of.first;
        const int panel = item % pairs * 2;
        const Packed& packed = experts.experts[of.expert].gate_up;
        multiply_of(packed)({gathered.row(first), of.count, row_bytes, &packed, Epilogue::gated,
                             hidden + first * inner * operand_size(), inner}, panel, panel + 2);
    });
    const Inputs inputs = inputs_of(experts.experts[0].down, hidden, places);
    threads->run((int)active.size() * panels, [&](int item, int) {
        const ExpertRows& of = active[item / panels];
        const size_t first = of.first;
        const int panel = item % panels;
        const Packed& packed = experts.experts[of.expert].down;
        multiply_of(packed)({inputs.row(first), of.count, inputs.row_bytes, &packed, Epilogue::store,
                             out + first * width, width}, panel, panel + 1);
    });
}

void Decoder::run_experts(const Experts& experts, const void* normed, float* x, int rows) {
    const int count = experts.experts.size();
    float* scores = (float*)buffers_.router.at_least((size_t)rows * count * sizeof(float));
    multiply(normed, rows, experts.router, Epilogue::store, scores, count);
    choose_experts(experts, scores, rows);
    const Inputs inputs = inputs_of(experts.experts[0].gate_up, normed, rows);
    multiply_experts(experts, gather(experts, inputs, rows), rows * experts.per_token, inputs.row_bytes);
    if (experts.has_shared) {
        float* shared = (float*)buffers_.shared_out.at_least((size_t)rows * weights.shape.width * sizeof(float));
        float* gate = (float*)buffers_.shared_gate.at_least(rows * sizeof(float));
        run_mlp(experts.shared, normed, rows, Epilogue::store, shared);
        multiply(normed, rows, experts.shared_gate, Epilogue::store, gate, 1);
    }
    add_experts(experts, x, rows);
}

// x += each token's experts by their weights, in the order of their choice, and the shared expert.
void Decoder::add_experts(const Experts& experts, float* x, int rows) {
    const int width = weights.shape.width, per_token = experts.per_token;
    const int32_t* place_of = (const int32_t*)buffers_.expert_rows.at_least(0);
    const float* shares = (const float*)buffers_.chosen_weights.at_least(0);
    const float* out = (const float*)buffers_.expert_out.at_least(0);
    const float* shared = (const float*)buffers_.shared_out.at_least(0);
    const float* gates = (const float*)buffers_.shared_gate.at_least(0);
    for_rows(rows, 8, [&](int first, int last) {
        std::vector<float> sums(width);
        for (int row = first; row < last; row++) {
            std::fill(sums.begin(), sums.end(), 0.0f);
            for (int i = row * per_token; i < (row + 1) * per_token; i++)
                for (int j = 0; j < width; j++) sums[j] += shares[i] * out[(size_t)place_of[i] * width + j];
            const float gate = experts.has_shared ? 1 / (1 + std::exp(-gates[row])) : 0;
            for (int j = 0; j < width; j++) {
                if (experts.has_shared) sums[j] += gate * shared[(size_t)row * width + j];
                x[(size_t)row * width + j] += sums[j];
            }
        }
    });
}

}  // namespace pfx
