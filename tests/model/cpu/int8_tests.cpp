// Tests of the int8 products of one kernel set: int8_tests NAME [few]. Rounded rows and products must have
// the bits of plain loops, so that all sets have the same. Prints what failed. Exit status: 1 where
// something did, 2 where the set cannot run here.
#include <algorithm>
#include <memory>

#include "kernel_cases.h"
#include "prefixd_cpu.h"

#ifdef PFX_HAS_AVX512
namespace pfx::avx512 {  // without AVX512-VNNI, which the table of the processor has instead
extern const Kernels float32_kernels, bfloat16_kernels;
}
#endif

static int failures = 0;
static bool few = false;

static void expect(bool holds, const std::string& what) {
    if (holds) return;
    failures++;
    if (failures <= 20) printf("FAILED: %s\n", what.c_str());
}

static bool same_bits(float a, float b) { return !memcmp(&a, &b, sizeof a); }

// Memory of exactly `bytes` on a cache line's border, so that a sanitizer sees an access past its end.
struct Lines {
    std::unique_ptr<char, void (*)(void*)> data{nullptr, std::free};

    explicit Lines(size_t bytes) {
        void* memory = nullptr;
        if (posix_memalign(&memory, kLine, bytes)) abort();
        data.reset((char*)memset(memory, 0x55, bytes));
    }
};

// A row as plain loops round it.
struct Rounded {
    float scale = 0;
    std::vector<int> codes;

    Rounded(Array& operand, size_t first, int inner) : codes(inner) {
        float largest = 0;
        bool finite = true;
        for (int i = 0; i < inner; i++) {
            finite &= std::isfinite(operand.get(first + i));
            largest = std::max(largest, std::fabs(operand.get(first + i)));
        }
        scale = finite ? largest / 127 : NAN;
        if (scale < 1.17549435e-38f) scale = 0;
        for (int i = 0; scale > 0 && i < inner; i++) codes[i] = (int)std::nearbyint(operand.get(first + i) / scale);
    }
};

static int code_at(const Int8Kernels& int8, const char* row, int i) {
    const char* codes = row + sizeof(RowHeader);
    return int8.code_size == 1 ? ((const int8_t*)codes)[i] : ((const int16_t*)codes)[i];
}

static void expect_rounded(const Int8Kernels& int8, Array& operand, int rows, int inner, const std::string& what) {
    const size_t bytes = int8.row_bytes(inner);
    Lines out(rows * bytes);
    int8.round_rows(operand.data(), inner, out.data.get(), 0, rows / 2);
    int8.round_rows(operand.data(), inner, out.data.get(), rows / 2, rows);
    for (int row = 0; row < rows; row++) {
        const char* received = out.data.get() + row * bytes;
        const RowHeader& header = *(const RowHeader*)received;
        const Rounded right(operand, (size_t)row * inner, inner);
        const std::string of = what + ", inner " + std::to_string(inner) + ", row " + std::to_string(row);
        expect(std::isnan(right.scale) ? std::isnan(header.scale) : same_bits(header.scale, right.scale),
               "scale: expected " + std::to_string(right.scale) + ", received " + std::to_string(header.scale) + of);
        int sum = 0, padded = (bytes - sizeof(RowHeader)) / int8.code_size;
        for (int i = 0; i < padded; i++) {
            const int wanted = i < inner ? right.codes[i] : 0, code = code_at(int8, received, i);
            sum += wanted;
            expect(code == wanted, "code " + std::to_string(i) + ": expected " + std::to_string(wanted) +
                                       ", received " + std::to_string(code) + of);
        }
        expect(header.sum == sum, "sum of codes" + of);
    }
}

static void test_rounding(const Kernels& kernels) {
    for (int inner : {1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 45, 63, 64, 65, 127, 128, 130, 576, 1000}) {
        Array operand(kernels.bf16_operands, (size_t)8 * inner);
        operand.fill_random();
        auto fill = [&](int row, auto value) {
            for (int i = 0; i < inner; i++) operand.set((size_t)row * inner + i, value(i));
        };
        fill(1, [&](int i) { return i == 0 ? -127.0f : i % 64 + 0.5f; });  // halves: to the even neighbour
        fill(2, [](int) { return 0.0f; });
        fill(3, [](int i) { return i % 2 ? -0.0f : 3e-39f; });  // the scale would be subnormal
        fill(4, [](int i) { return i % 3 ? 3e38f : -3e38f; });
        fill(5, [](int i) { return i % 2 ? 1e-37f : -2e-36f; });
        operand.set((size_t)6 * inner + inner - 1, NAN);
        operand.set((size_t)7 * inner + inner / 2, -INFINITY);
        expect_rounded(kernels.int8, operand, 8, inner, ", rounding");
    }
}

// Random weights, packed, and a product with them.
struct Case {
    const Kernels& kernels;
    int outputs, inner, rows;
    bool gated, biased;
    std::vector<int8_t> weight;
    std::vector<float> scales, bias;  // by output
    Array operand;

    Case(const Kernels& kernels, int outputs, int inner, int rows, bool gated, bool biased)
        : kernels(kernels), outputs(outputs), inner(inner), rows(rows), gated(gated), biased(biased),
          weight((size_t)outputs * (gated ? 2 : 1) * inner), operand(kernels.bf16_operands, (size_t)rows * inner) {
        for (int8_t& code : weight) code = (int)(generator() % 255) - 127;
        operand.fill_random();
        for (int i = 0; i < outputs * (gated ? 2 : 1); i++) {
            scales.push_back(0.01f * std::exp(random_float()));
            bias.push_back(random_float());
        }
    }

    std::string name() const {
        return std::to_string(rows) + " rows of " + std::to_string(inner) + " to " + std::to_string(outputs) +
               (gated ? " gated" : "") + (biased ? " biased" : "") + (kernels.bf16_operands ? " bfloat16" : " float32");
    }

    Array out() const { return Array(gated && kernels.bf16_operands, (size_t)rows * (outputs + 3)); }

    // The sum, scaled: what a kernel may not merge with a following addition.
    float scaled(const Rounded& row, int output) const {
        int64_t sum = 0;
        for (int i = 0; i < inner; i++) sum += row.codes[i] * weight[(size_t)output * inner + i];
        volatile float product = (float)sum * (row.scale * scales[output]);
        return product + (biased ? bias[output] : 0.0f);
    }

    Array run(Epilogue epilogue, int first_row, int count) {
        const int columns = kernels.panel_columns, halves = gated ? 2 : 1;
        const int panels = (outputs + columns - 1) / columns * halves;
        const size_t panel_bytes = (size_t)(inner + 3) / 4 * 4 * columns, row_bytes = kernels.int8.row_bytes(inner);
        Lines packed(panels * panel_bytes), rounded(count * row_bytes);
        std::vector<float> panel_scales(panels * columns), panel_bias(panels * columns);
        for (int half = 0; half < halves; half++) {
            const int8_t* rows_of_half = weight.data() + (size_t)half * outputs * inner;
            for (int i = 0; i < panels / halves; i++)  // a half's panels alternate with the other's
                kernels.int8.pack(rows_of_half, outputs, inner, packed.data.get() + (i * (halves - 1) + half) * panel_bytes,
                                  i, i + 1);
            for (int i = 0; i < outputs; i++) {
                const size_t column = (size_t)(i / columns * halves + half) * columns + i % columns;
                panel_scales[column] = scales[half * outputs + i];
                panel_bias[column] = bias[half * outputs + i];
            }
        }
        const char* from = operand.bytes() + (size_t)first_row * inner * operand.element();
        kernels.int8.round_rows(from, inner, rounded.data.get(), 0, count);
        const Packed weights = {packed.data.get(), biased ? panel_bias.data() : nullptr, panel_scales.data(),
                                outputs * halves, inner, panels};
        Array result = out();
        for (size_t i = 0; i < result.size(); i++) result.set(i, i % 64 - 32.0f);
        for (int panel = 0; panel < panels; panel += halves)
            kernels.int8.multiply({rounded.data.get(), count, row_bytes, &weights, epilogue, result.data(), outputs + 3},
                                  panel, panel + halves);
        return result;
    }
};

static void expect_sums(Case& test, Epilogue epilogue) {
    Array received = test.run(epilogue, 0, test.rows);
    for (int row = 0; row < test.rows; row++) {
        const Rounded rounded(test.operand, (size_t)row * test.inner, test.inner);
        for (int i = 0; i < test.outputs + 3; i++) {
            const size_t at = (size_t)row * (test.outputs + 3) + i;
            const float before = at % 64 - 32.0f;
            const bool written = i < test.outputs;
            const float product = written ? test.scaled(rounded, i) : 0;
            const float wanted = !written ? before : epilogue == Epilogue::add ? before + product : product;
            expect(same_bits(received.get(at), wanted),
                   "output " + std::to_string(i) + " of row " + std::to_string(row) + ": expected " +
                       std::to_string(wanted) + ", received " + std::to_string(received.get(at)) + ": " + test.name());
        }
    }
}

static void expect_gated(Case& test) {
    Array received = test.run(Epilogue::gated, 0, test.rows);
    for (int row = 0; row < test.rows; row++) {
        const Rounded rounded(test.operand, (size_t)row * test.inner, test.inner);
        for (int i = 0; i < test.outputs + 3; i++) {
            const size_t at = (size_t)row * (test.outputs + 3) + i;
            double wanted = at % 64 - 32.0;
            if (i < test.outputs) {
                const double gate = test.scaled(rounded, i), up = test.scaled(rounded, test.outputs + i);
                wanted = gate / (1 + std::exp(-gate)) * up;
            }
            const double bound = (test.kernels.bf16_operands ? 1 / 256.0 : 2e-6) * std::fabs(wanted) + 1e-30;
            expect(std::fabs(received.get(at) - wanted) <= bound,
                   "output " + std::to_string(i) + " of row " + std::to_string(row) + ": expected " +
                       std::to_string(wanted) + ", received " + std::to_string(received.get(at)) + ": " + test.name());
        }
    }
}

static bool same_rows(const Case& test, Array& a, int row, Array& b, int other) {
    const size_t bytes = test.outputs * a.element(), stride = (test.outputs + 3) * a.element();
    return !memcmp(a.bytes() + row * stride, b.bytes() + other * stride, bytes);
}

static void test_products(const Kernels& kernels) {
    const int columns = kernels.panel_columns;
    const std::vector<int> row_counts = few ? std::vector<int>{1, 8, 37} : std::vector<int>{1, 2, 3, 6, 7, 8, 9, 16, 17, 31, 32, 33, 70};
    for (int inner : {1, 3, 4, 45, 64, 66, 127, 576})
        for (int outputs : {1, columns - 1, columns, 2 * columns + 5})
            for (int rows : row_counts)
                for (bool biased : {false, true}) {
                    Case plain(kernels, outputs, inner, rows, false, biased);
                    expect_sums(plain, Epilogue::store);
                    expect_sums(plain, Epilogue::add);
                    Case gated(kernels, outputs, inner, rows, true, biased);
                    expect_gated(gated);
                }
}

// A row's result has the same bits alone and among others, of which one is NaN and one infinite.
static void test_rows_apart(const Kernels& kernels) {
    for (bool gated : {false, true})
        for (int rows : {5, 19, 70}) {
            Case test(kernels, 2 * kernels.panel_columns + 1, 130, rows, gated, true);
            const Epilogue epilogue = gated ? Epilogue::gated : Epilogue::store;
            Array clean = test.run(epilogue, 0, rows);
            test.operand.set(1 * 130 + 129, NAN);
            test.operand.set(3 * 130, INFINITY);
            Array mixed = test.run(epilogue, 0, rows);
            for (int row = 0; row < rows; row++) {
                const bool bad = row == 1 || row == 3;
                for (int i = 0; bad && i < test.outputs; i++)
                    expect(std::isnan(mixed.get((size_t)row * (test.outputs + 3) + i)), "a row with NaN: " + test.name());
                if (bad) continue;
                Array alone = test.run(epilogue, row, 1);
                expect(same_rows(test, alone, 0, mixed, row), "bits of a row alone: " + test.name());
                expect(same_rows(test, clean, row, mixed, row), "NaN reached another row: " + test.name());
            }
        }
}

// The largest sums that there are, of either sign, and weights that are zero with their scale.
static void test_extremes(const Kernels& kernels) {
    for (int inner : {64, few ? 1000 : kMaxInt8Inputs}) {
        Case test(kernels, kernels.panel_columns + 1, inner, 2, false, false);
        std::fill(test.weight.begin(), test.weight.end(), 127);
        std::fill(test.weight.begin(), test.weight.begin() + inner, -127);
        std::fill(test.weight.begin() + inner, test.weight.begin() + 2 * inner, 0);
        test.scales[1] = 0;
        for (size_t i = 0; i < test.operand.size(); i++) test.operand.set(i, i < (size_t)inner ? 2.0f : -3.0f);
        expect_sums(test, Epilogue::store);
    }
}

static void test_all(const Kernels& kernels) {
    test_rounding(kernels);
    test_products(kernels);
    test_rows_apart(kernels);
    test_extremes(kernels);
}

int main(int count, char** arguments) {
    const std::string name = count > 1 ? arguments[1] : "portable";
    few = count > 2;
    int isa = PFX_PORTABLE;
    while (isa <= PFX_AMX && name != pfx_isa_name(isa)) isa++;
    if (isa > PFX_AMX || !(pfx_available() >> isa & 1)) {
        printf("expected kernels that the build and the processor have, got %s\n", name.c_str());
        return 2;
    }
    for (int dtype : {PFX_F32, PFX_BF16})
        if (dtype == PFX_BF16 || isa <= PFX_AVX512) test_all(*kernels_for(dtype, isa));
#ifdef PFX_HAS_AVX512
    if (isa == PFX_AVX512) test_all(avx512::float32_kernels);
    if (isa == PFX_AVX512) test_all(avx512::bfloat16_kernels);
#endif
    printf("%d failed\n", failures);
    return failures > 0;
}
