// A decoder's life through the public interface: decoder_tests ISA THREADS ROUNDS
//
// Prints the results of every pass, so that machines can be compared; fails where a row differs from
// the same row alone, in bits. For sanitizers, too: every array has exactly its size.
#include <algorithm>

#include "decoder_model.h"

static void print(const Model& model, const char* pass, const Result& result) {
    for (size_t row = 0; row < result.best.size(); row++) {
        printf("%s%s %s %s %zu", model.config.name, model.int8 ? "-int8" : "",
               model.dtype == PFX_F32 ? "float32" : "bfloat16", pass, row);
        for (int32_t i = 0; i < model.config.vocab; i++)
            printf(" %.9g", result.logits[row * model.config.vocab + i]);
        printf("\n");
    }
}

static std::vector<int32_t> tokens(Random& random, int32_t count, int32_t below) {
    std::vector<int32_t> ids(count);
    for (int32_t& id : ids) id = std::min((int32_t)((random.next(0.5f) + 0.5f) * below), below - 1);
    return ids;
}

static void check_best(const Model& model, const Result& result) {
    for (size_t row = 0; row < result.best.size(); row++) {
        const float* logits = &result.logits[row * model.config.vocab];
        int32_t best = (int32_t)(std::max_element(logits, logits + model.config.vocab - 1) - logits);
        require(best == result.best[row] && logits[best] == result.best_value[row], "the largest logit");
    }
}

static bool same_row(const Model& model, const Result& a, size_t row, const Result& b, size_t other) {
    size_t vocab = model.config.vocab;
    return !memcmp(&a.logits[row * vocab], &b.logits[other * vocab], vocab * sizeof(float));
}

// Three sequences of a shared prefix of one block; then decode steps, in a batch and alone.
static void check_passes(Model& model, int32_t threads) {
    int32_t size = model.config.block_size, below = model.config.vocab;
    Random random{7};
    run(model, {{0, tokens(random, size, below), {3}}});
    std::vector<Row> rows = {{size, tokens(random, 5, below), {3, 4, 5}},
                             {size, tokens(random, size + 3, below), {3, 6, 7}},
                             {size, tokens(random, 1, below), {3, 8, 9}}};
    Result first = run(model, rows);
    print(model, "prompts", first);
    check_best(model, first);
    for (size_t row = 0; row < rows.size(); row++)  // again, alone: the same keys and values
        require(same_row(model, run(model, {rows[row]}), 0, first, row), "a prompt alone has other bits");
    for (int32_t step = 0; step < 4; step++) {
        require(pfx_set_threads(model.decoder, 1 + (threads + step) % threads, step * 10) == 0, "threads");
        for (size_t row = 0; row < rows.size(); row++) {
            rows[row].start += (int32_t)rows[row].tokens.size();
            rows[row].tokens = tokens(random, 1, below);
        }
        Result batch = run(model, rows);
        check_best(model, batch);
        print(model, "decode", batch);
        std::vector<Row> mixed = {rows[2], {0, tokens(random, 9, below), {10}}, rows[0]};
        Result others = run(model, mixed);
        require(same_row(model, others, 0, batch, 2), "a decode row has other bits among others");
        require(same_row(model, others, 2, batch, 0), "a decode row has other bits among others");
    }
}

// Keys and values of a compiled prefix: out of the pool, into other blocks, and used there.
static void check_pool(Model& model) {
    int32_t size = model.config.block_size, count = size + 5, below = model.config.vocab;
    size_t row = (size_t)model.config.kv_heads * model.config.head_dim;
    size_t bytes = 2 * model.config.layers * count * row * (model.dtype == PFX_F32 ? 4 : 2);
    Random random{8};
    std::vector<int32_t> prompt = tokens(random, count, below), from = {11, 12}, to = {13, 14}, copy = {15, 16};
    run(model, {{0, prompt, from}});
    std::vector<uint8_t> kv(bytes), again(bytes);
    require(pfx_read_kv(model.decoder, from.data(), 0, count, kv.data()) == 0, "pfx_read_kv");
    require(pfx_zero_blocks(model.decoder, to.data(), 2) == 0, "pfx_zero_blocks");
    require(pfx_write_kv(model.decoder, to.data(), 0, count, kv.data()) == 0, "pfx_write_kv");
    require(pfx_read_kv(model.decoder, to.data(), 0, count, again.data()) == 0, "pfx_read_kv");
    require(kv == again, "keys and values that were written are read back");
    require(pfx_copy_blocks(model.decoder, to.data(), copy.data(), 2) == 0, "pfx_copy_blocks");
    std::vector<int32_t> next = tokens(random, 1, below);
    Result own = run(model, {{count, next, from}});
    require(same_row(model, own, 0, run(model, {{count, next, copy}}), 0), "a copied prefix has other bits");
    print(model, "prefix", own);
}

// Embeddings in place of token ids, as the virtual tokens of a soft prompt.
static void check_inputs(Model& model) {
    int32_t below = std::min(model.config.vocab, model.config.embeddings);
    Random random{9};
    std::vector<int32_t> ids = tokens(random, 7, below);
    size_t bytes = ids.size() * model.config.width * (model.dtype == PFX_F32 ? 4 : 2);
    std::vector<uint8_t> inputs(bytes);
    require(pfx_read_embeddings(model.decoder, ids.data(), (int32_t)ids.size(), inputs.data()) == 0,
            "pfx_read_embeddings");
    Result by_ids = run(model, {{0, ids, {17}}});
    std::vector<int32_t> none(ids.size(), -1);
    Result by_inputs = run(model, {{0, none, {18}}}, inputs.data());
    require(same_row(model, by_ids, 0, by_inputs, 0), "embeddings of tokens give other bits than the tokens");
    print(model, "inputs", by_inputs);
}

// Rows of gated prefixes, some of more than a chunk of positions, next to a row without.
static void check_gated(Model& model) {
    int32_t size = model.config.block_size, below = model.config.vocab, last = model.config.layers - 1;
    size_t row = (size_t)model.config.kv_heads * model.config.head_dim;
    Random random{10};
    const std::vector<int32_t> few = {17};
    std::vector<int32_t> blocks;  // each several times: the pool has few
    for (int32_t i = 0; i < 18; i++) blocks.push_back(18 + i % 6);
    const int32_t count = 17 * size + 1;
    Array kv(model.dtype, 2 * model.config.layers * count * row, random, 1);
    require(pfx_write_kv(model.decoder, blocks.data(), 0, count, kv.data()) == 0, "pfx_write_kv");
    require(pfx_copy_blocks(model.decoder, blocks.data(), few.data(), 1) == 0, "pfx_copy_blocks");
    const std::vector<Row> rows = {{0, tokens(random, 9, below), {3}, count, 0, blocks},
                                   {0, tokens(random, size + 2, below), {4, 5}},
                                   {0, tokens(random, 4, below), {6}, 3, last, few}};
    Result batch = run(model, rows);
    print(model, "gated", batch);
    for (size_t i = 0; i < rows.size(); i++) {
        Result alone = run(model, {rows[i]});
        require(same_row(model, alone, 0, batch, i), "a gated row alone has other bits");
        Row plain = {0, rows[i].tokens, rows[i].table};
        bool same = same_row(model, run(model, {plain}), 0, batch, i);
        require(same == (rows[i].gated_count == 0), "a gated prefix changes the row that has it");
    }
}

// Gated rows that no step can have: an error, before any of them is read.
static void check_refused_gated(Model& model) {
    int32_t size = model.config.block_size, layers = model.config.layers;
    auto refused = [&](Row row, const char* what, auto change) {
        Result result;
        require(!run(model, {{0, {1}, {4}}, row}, nullptr, result, change), what);
        require(strstr(pfx_error(), what) && !strncmp(pfx_error(), "pfx_run: ", 9), what);
    };
    auto same = [](pfx_step&) {};
    const Row good = {0, {1, 2}, {3}, size + 1, layers - 1, {5, 6}};
    auto with = [&](int32_t count, int32_t layer, std::vector<int32_t> table) {
        return Row{0, {1, 2}, {3}, count, layer, table};
    };
    for (int32_t count : {-1, 2 * size + 1, INT32_MAX, INT32_MIN}) refused(with(count, 0, {5, 6}), "gated_count", same);
    for (int32_t layer : {-1, layers, INT32_MAX}) refused(with(1, layer, {5}), "gated_layer", same);
    for (int32_t block : {-1, Model::kBlocks, INT32_MAX, INT32_MIN}) refused(with(size + 1, 0, {5, block}), "gated_block", same);
    for (int32_t width : {-1, Model::kBlocks + 1, INT32_MAX})
        refused(good, "gated_width", [&](pfx_step& step) { step.gated_width = width; });
    refused(good, "gated_layers", [](pfx_step& step) { step.gated_layers = nullptr; });
    refused(good, "gated_tables", [](pfx_step& step) { step.gated_tables = nullptr; });
    run(model, {good});
}

// Keys and values that a layer's products make of given rows: any number of them, each as if alone.
static void check_project(Model& model) {
    size_t width = model.config.width, of_row = (size_t)model.config.kv_heads * model.config.head_dim;
    size_t bytes = width * (model.dtype == PFX_F32 ? 4 : 2);
    Random random{11};
    for (int32_t count : {1, 7, 33, 130}) {
        Array inputs(model.dtype, count * width, random, 1);
        std::vector<float> keys(count * of_row), values(count * of_row), key(of_row), value(of_row);
        int32_t layer = count % model.config.layers;
        require(pfx_project(model.decoder, layer, inputs.data(), count, keys.data(), values.data()) == 0, "pfx_project");
        for (int32_t row = 0; row < count; row += 16) {
            std::vector<uint8_t> alone((const uint8_t*)inputs.data() + row * bytes,
                                       (const uint8_t*)inputs.data() + (row + 1) * bytes);
            require(pfx_project(model.decoder, layer, alone.data(), 1, key.data(), value.data()) == 0, "pfx_project");
            require(!memcmp(&keys[row * of_row], key.data(), of_row * sizeof(float)) &&
                        !memcmp(&values[row * of_row], value.data(), of_row * sizeof(float)),
                    "a projected row alone has other bits");
        }
    }
    std::vector<float> one(std::max(width, of_row));
    for (int32_t layer : {-1, model.config.layers, INT32_MAX})
        require(pfx_project(model.decoder, layer, one.data(), 1, one.data(), one.data()) != 0, "a layer is refused");
    require(pfx_project(model.decoder, 0, one.data(), -1, one.data(), one.data()) != 0, "rows are refused");
    require(pfx_project(model.decoder, 0, nullptr, 1, one.data(), one.data()) != 0, "no inputs are refused");
    require(pfx_project(model.decoder, 0, one.data(), 1, nullptr, one.data()) != 0, "no keys are refused");
    require(pfx_project(model.decoder, 0, one.data(), 1, one.data(), nullptr) != 0, "no values are refused");
    require(pfx_project(nullptr, 0, one.data(), 1, one.data(), one.data()) != 0, "no decoder is refused");
    require(pfx_project(model.decoder, 0, nullptr, 0, nullptr, nullptr) == 0, "no rows need nothing");
}

int main(int count, char** arguments) {
    require(count == 4, "expected: decoder_tests ISA THREADS ROUNDS");
    int32_t isa = -1, threads = atoi(arguments[2]), rounds = atoi(arguments[3]);
    for (int32_t i = 0; i < 5; i++)
        if (!strcmp(pfx_isa_name(i), arguments[1])) isa = i;
    require(isa >= 0 && (pfx_available() >> isa & 1), "the kernels are not available");
    require(pfx_abi() == PFX_ABI, "the interface");
    for (int32_t round = 0; round < rounds; round++)
        for (const Config& config : kConfigs)
            for (int32_t kind = 0; kind < 4; kind++) {
                Model model(config, kind % 2 ? PFX_BF16 : PFX_F32, isa, kind / 2);
                require(pfx_set_threads(model.decoder, threads, 20) == 0, "pfx_set_threads");
                check_passes(model, threads);
                check_pool(model);
                check_inputs(model);
                check_gated(model);
                check_refused_gated(model);
                check_project(model);
                pfx_counters counters;
                pfx_read_counters(model.decoder, &counters);
                require(counters.steps > 10 && counters.step_ns > 0, "the counters");
                require(pfx_num_bytes(model.decoder) > 0, "pfx_num_bytes");
            }
    return 0;
}
