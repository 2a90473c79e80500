// Tests of the attention kernels of one kernel set against float64: kernel_tests NAME [few]. Prints what
// failed. Exit status: 1 where something did, 2 where the set cannot run here.
#include "kernel_cases.h"
#include "prefixd_cpu.h"

static int failures = 0;

static void expect(bool holds, const std::string& what) {
    if (holds) return;
    failures++;
    if (failures <= 20) printf("FAILED: %s\n", what.c_str());
}

static AttentionShape shape_of(int head_dim, int kv_heads, int group, int block_size) {
    return {kv_heads * group, kv_heads, head_dim, head_dim, block_size, 1 / std::sqrt((float)head_dim),
            1e-5f};
}

static std::string name_of(const World& world) {
    std::string name = std::string(world.half_pool ? "bfloat16" : "float32") + " head_dim " +
                       std::to_string(world.shape.head_dim) + " heads " +
                       std::to_string(world.shape.num_heads) + "/" +
                       std::to_string(world.shape.num_kv_heads) + " block " +
                       std::to_string(world.shape.block_size) + " shared " + std::to_string(world.shared) +
                       " rows";
    for (const Row& row : world.rows)
        name += " " + std::to_string(row.start) + "+" + std::to_string(row.length);
    return name;
}

// Weights and outputs are rounded to 8 bits where operands are bfloat16.
static double tolerance(const World& world) { return world.kernels.bf16_operands ? 0.02 : 4e-6; }

static void expect_right(const World& world, const std::string& how) {
    for (size_t r = 0; r < world.rows.size(); r++) {
        double error = world.error(r);
        expect(error <= tolerance(world), how + " of row " + std::to_string(r) + ": expected an error of at most " +
                                             std::to_string(tolerance(world)) + ", received " +
                                             std::to_string(error) + ": " + name_of(world));
    }
}

static bool same_bits(const Array& a, const Array& b) {
    return a.half ? a.halves == b.halves : !memcmp(a.floats.data(), b.floats.data(), a.size() * 4);
}

struct Sizes {
    int head_dim, kv_heads, group, block_size;
};

static std::vector<Sizes> sizes = {{64, 3, 3, 16}, {64, 1, 8, 32},  {128, 2, 4, 16}, {16, 2, 1, 16},
                                          {48, 1, 2, 32}, {80, 2, 7, 16}, {96, 1, 4, 32},  {256, 1, 2, 16}};

static void test_lengths(const Kernels& kernels, bool half) {
    for (const Sizes& s : sizes) {
        AttentionShape shape = shape_of(s.head_dim, s.kv_heads, s.group, s.block_size);
        World decode(kernels, half, shape, {{0, 1}, {14, 1}, {15, 1}, {16, 1}, {254, 1}, {255, 1}, {256, 1}, {999, 1}}, 0);
        decode.fill_tails(NAN);
        decode.attend_rows(1);
        expect_right(decode, "decode");
        World prefill(kernels, half, shape, {{0, 15}, {0, 17}, {250, 40}, {0, 257}, {1000, 3}}, 0);
        prefill.fill_tails(NAN);
        prefill.attend_rows(16);
        expect_right(prefill, "prefill");
        Array tiled = prefill.out;
        prefill.attend_rows(5);
        expect(prefill.kernels.bf16_operands || same_bits(tiled, prefill.out), "bits by tile size: " + name_of(prefill));
    }
}

static void test_shared(const Kernels& kernels, bool half) {
    for (const Sizes& s : sizes)
        for (int shared : {1, 2, 33}) {
            AttentionShape shape = shape_of(s.head_dim, s.kv_heads, s.group, s.block_size);
            int from = shared * s.block_size;
            World world(kernels, half, shape, {{from, 1}, {from + 15, 1}, {from + 16, 1}, {from + 250, 1}, {from + 3, 1}}, shared);
            world.fill_tails(NAN);
            world.attend_rows(1);
            Array alone = world.out;
            world.attend_together();
            expect_right(world, "shared");
            expect(same_bits(alone, world.out), "bits of shared blocks: " + name_of(world));
        }
}

// A NaN in one row's own keys, values or query leaves the others' bits as they are.
static void test_isolation(const Kernels& kernels, bool half) {
    for (const Sizes& s : sizes) {
        AttentionShape shape = shape_of(s.head_dim, s.kv_heads, s.group, s.block_size);
        int from = 2 * s.block_size;
        for (int place = 0; place < 3; place++) {
            World world(kernels, half, shape, {{from + 2, 1}, {from + 2, 1}, {from + 20, 1}}, 2);
            world.attend_together();
            Array clean = world.out;
            size_t elements = (size_t)s.kv_heads * s.group * s.head_dim;
            if (place < 2) (place ? world.values : world.keys)[1].set((size_t)(from + 1) * world.width(), NAN);
            else world.queries.set(elements, NAN);
            world.write(1);
            world.attend_together();
            expect(std::isnan(world.out.get(elements)), "NaN must be seen by its own row: " + name_of(world));
            for (size_t i = 0; i < world.out.size(); i++)
                if (i < elements || i >= 2 * elements)
                    expect(world.out.get(i) == clean.get(i), "NaN reached another row: " + name_of(world));
        }
    }
}

static void test_round_trip(const Kernels& kernels, bool half) {
    for (const Sizes& s : sizes) {
        World world(kernels, half, shape_of(s.head_dim, s.kv_heads, s.group, s.block_size), {{0, 77}, {5, 30}}, 0);
        for (int row = 0; row < 2; row++) {
            const int start = row ? 3 : 0, count = world.end(row) - start;
            Array keys(half, (size_t)count * world.width()), values = keys;
            kernels.read_kv(world.pool(), world.shape, world.table(row), start, count, keys.data(), values.data());
            size_t skipped = (size_t)start * world.width() * keys.element(), bytes = keys.size() * keys.element();
            expect(!memcmp(keys.bytes(), world.keys[row].bytes() + skipped, bytes) &&
                       !memcmp(values.bytes(), world.values[row].bytes() + skipped, bytes),
                   "round trip of keys and values: " + name_of(world));
        }
    }
}

// RMS norm per head where asked for, rotation of the first dimensions, then one rounding.
static std::vector<double> rotated(const float* head, const AttentionShape& shape, const float* norm,
                                   const float* cosine, const float* sine) {
    std::vector<double> x(head, head + shape.head_dim), y;
    double squares = 0;
    for (double v : x) squares += v * v;
    for (int i = 0; norm && i < shape.head_dim; i++)
        x[i] *= norm[i] / std::sqrt(squares / shape.head_dim + (double)shape.norm_eps);
    y = x;
    const int half = shape.rotary_dim / 2;
    for (int i = 0; i < half; i++) {
        y[i] = x[i] * cosine[i] - x[i + half] * sine[i];
        y[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
    }
    return y;
}

static bool close(float received, double right, bool half) {
    return std::fabs(received - right) <= (half ? std::fabs(right) / 256 + 1e-6 : 2e-6 * (1 + std::fabs(right)));
}

static void test_rotation(const Kernels& kernels, bool half_pool) {
    for (const Sizes& s : sizes)
        for (int variant = 0; variant < 3; variant++) {
            AttentionShape shape = shape_of(s.head_dim, s.kv_heads, s.group, s.block_size);
            if (variant == 1) shape.rotary_dim = s.head_dim / 4 + (s.head_dim / 4) % 2;
            World world(kernels, half_pool, shape, {{0, 5}, {14, 20}, {100, 1}}, 0);
            const int heads = shape.num_heads + 2 * shape.num_kv_heads, d = s.head_dim, half = shape.rotary_dim / 2;
            std::vector<float> qkv((size_t)world.num_tokens * heads * d), norms(2 * d), angles(128 * half), cosine, sine;
            for (float& x : qkv) x = random_float();
            for (float& x : norms) x = random_float();
            for (float& x : angles) x = random_float();
            for (float x : angles) cosine.push_back(std::cos(x)), sine.push_back(std::sin(x));
            const float *q_norm = variant == 2 ? norms.data() : nullptr, *k_norm = q_norm ? q_norm + d : nullptr;
            for (int first = 0; first < world.num_tokens; first += 7)
                kernels.rotate_and_write(qkv.data(), world.queries.data(), world.pool(), world.batch(), shape, q_norm,
                                         k_norm, cosine.data(), sine.data(), first, std::min(first + 7, world.num_tokens));
            bool right = true;
            for (int token = 0; token < world.num_tokens; token++) {
                const int row = world.row_of[token], position = world.position_of[token];
                Array keys(half_pool, world.width()), values = keys;
                kernels.read_kv(world.pool(), shape, world.table(row), position, 1, keys.data(), values.data());
                for (int h = 0; h < heads; h++) {
                    const float* in = qkv.data() + ((size_t)token * heads + h) * d;
                    const bool is_query = h < shape.num_heads, is_key = !is_query && h < shape.num_heads + shape.num_kv_heads;
                    std::vector<double> wanted = rotated(in, shape, is_query ? q_norm : k_norm, cosine.data() + position * half, sine.data() + position * half);
                    for (int i = 0; i < d; i++) {
                        if (is_query) right &= close(world.queries.get(((size_t)token * shape.num_heads + h) * d + i), wanted[i], kernels.bf16_operands);
                        else if (is_key) right &= close(keys.get((h - shape.num_heads) * d + i), wanted[i], half_pool);
                        else right &= values.get((h - shape.num_heads - shape.num_kv_heads) * d + i) == (half_pool ? to_float(to_bf16(in[i])) : in[i]);
                    }
                }
            }
            expect(right, "rotation, variant " + std::to_string(variant) + ": " + name_of(world));
        }
}

static void test_norm(const Kernels& kernels) {
    for (int width : {1, 15, 16, 17, 64, 576, 1000}) {
        std::vector<float> x(3 * width), weight(width);
        for (float& v : x) v = 3 * random_float();
        for (float& v : weight) v = random_float();
        x[2 * width] = NAN;
        Array out(kernels.bf16_operands, 3 * width);
        kernels.norm(x.data(), weight.data(), out.data(), width, 1e-5f, 0, 2);
        kernels.norm(x.data(), weight.data(), out.data(), width, 1e-5f, 2, 3);
        for (int row = 0; row < 2; row++) {
            double squares = 0;
            for (int i = 0; i < width; i++) squares += (double)x[row * width + i] * x[row * width + i];
            for (int i = 0; i < width; i++)
                expect(close(out.get(row * width + i), x[row * width + i] / std::sqrt(squares / width + 1e-5) * weight[i], kernels.bf16_operands),
                       "norm of width " + std::to_string(width));
        }
        for (int i = 0; i < width; i++) expect(std::isnan(out.get(2 * width + i)), "NaN in a norm of width " + std::to_string(width));
    }
}

static void test_largest(const Kernels& kernels) {
    for (int n : {1, 15, 16, 17, 500, 512, 513, 49152})
        for (int place : {0, n / 2, n - 1})
            for (int variant = 0; variant < 4; variant++) {
                std::vector<float> logits(n);
                for (float& x : logits) x = variant == 1 ? -INFINITY : -std::fabs(random_float());
                if (variant == 0 || variant == 2) logits[place] = 7;
                if (variant == 0) logits[n - 1] = 7;  // the first of several counts
                if (variant == 2 && n > 1) logits[place ? 0 : 1] = NAN;
                if (variant == 3) logits[place] = INFINITY;
                int32_t index = -1;
                float value = 0;
                kernels.largest(logits.data(), n, &index, &value);
                bool nan = variant == 2 && n > 1;
                int wanted = variant == 1 || nan ? 0 : place;
                expect(index == wanted && (nan ? std::isnan(value) : value == logits[wanted]),
                       "largest of " + std::to_string(n) + ", variant " + std::to_string(variant) + ": expected index " +
                           std::to_string(wanted) + ", received " + std::to_string(index));
            }
}

int main(int count, char** arguments) {
    const std::string name = count > 1 ? arguments[1] : "portable";
    if (count > 2) sizes = {sizes[0], sizes[5]};
    int isa = PFX_PORTABLE;
    while (isa <= PFX_AMX && name != pfx_isa_name(isa)) isa++;
    if (!(pfx_available() >> isa & 1)) {
        printf("expected kernels that the build and the processor have, got %s\n", name.c_str());
        return 2;
    }
    for (int dtype : {PFX_F32, PFX_BF16}) {
        const Kernels& kernels = *kernels_for(dtype, isa);
        if (dtype == PFX_F32 && isa > PFX_AVX512) continue;  // the kernels of AVX-512
        test_round_trip(kernels, dtype);
        test_rotation(kernels, dtype);
        test_norm(kernels);
        test_largest(kernels);
        test_lengths(kernels, dtype);
        test_shared(kernels, dtype);
        test_isolation(kernels, dtype);
    }
    printf("%d failed\n", failures);
    return failures > 0;
}
