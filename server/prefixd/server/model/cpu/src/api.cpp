// The C interface: exceptions become error texts.
#include <exception>
#include <new>
#include <string>

#include "decoder.h"
#include "prefixd_cpu.h"
#include "processor.h"

struct pfx_decoder : pfx::Decoder {
    using pfx::Decoder::Decoder;
};

namespace {

thread_local std::string last_error;

template <typename Call>
int guarded(const char* name, const Call& call) {
    try {
        call();
        return 0;
    } catch (const std::bad_alloc&) {
        last_error = std::string(name) + ": out of memory";
    } catch (const std::exception& error) {
        last_error = std::string(name) + ": " + error.what();
    }
    return 1;
}

// A call of a function of a decoder.
template <typename Decoder, typename Call>
int guarded(const char* name, Decoder* decoder, const Call& call) {
    return guarded(name, [&] {
        pfx::check(decoder != nullptr, "expected a decoder, got NULL");
        call(*decoder);
    });
}

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

const char* name_of(int isa) { return isa >= PFX_PORTABLE && isa <= PFX_AMX ? kNames[isa] : nullptr; }

std::string available_names() {
    std::string names;
    for (int isa = PFX_PORTABLE; isa <= PFX_AMX; isa++)
        if (pfx::available_isas() >> isa & 1) names += (names.empty() ? "" : ", ") + std::string(kNames[isa]);
    return names;
}

}  // namespace

extern "C" {

int32_t pfx_abi(void) { return PFX_ABI; }
const char* pfx_error(void) { return last_error.c_str(); }
uint32_t pfx_available(void) { return pfx::available_isas(); }
const char* pfx_isa_name(int32_t isa) { return name_of(isa); }

pfx_decoder* pfx_new(const pfx_shape* shape, int32_t isa) {
    pfx_decoder* decoder = nullptr;
    guarded("pfx_new", [&] {
        pfx::check(shape != nullptr, "expected a shape, got NULL");
        pfx::check_shape(*shape);
        const char* name = name_of(isa);
        pfx::check(name && pfx::available_isas() >> isa & 1,
                   "isa: expected one of " + available_names() + ", got " + (name ? name : std::to_string(isa)));
        decoder = new pfx_decoder(*shape, *pfx::kernels_for(shape->dtype, isa));
    });
    return decoder;
}

void pfx_free(pfx_decoder* decoder) { delete decoder; }

int pfx_set_rotary(pfx_decoder* decoder, const float* cosine, const float* sine) {
    return guarded("pfx_set_rotary", decoder, [&](auto& d) { d.weights.set_rotary(cosine, sine); });
}

int pfx_set_layer(pfx_decoder* decoder, int32_t layer, const pfx_layer* weights) {
    return guarded("pfx_set_layer", decoder, [&](auto& d) {
        pfx::check(weights != nullptr, "expected weights, got NULL");
        d.weights.set_layer(layer, *weights, *d.threads);
    });
}

int pfx_set_ends(pfx_decoder* decoder, const void* final_norm, const pfx_linear* head, const void* embedding) {
    return guarded("pfx_set_ends", decoder, [&](auto& d) {
        pfx::check(head != nullptr, "expected a head, got NULL");
        d.weights.set_ends(final_norm, *head, embedding, *d.threads);
    });
}

int pfx_set_threads(pfx_decoder* decoder, int32_t threads, int32_t spin_us) {
    return guarded("pfx_set_threads", decoder, [&](auto& d) {
        pfx::check(threads >= 1 && threads <= 1024, pfx::expected("threads", "1 to 1024", threads));
        pfx::check(spin_us >= 0, pfx::expected("spin_us", "0 or more", spin_us));
        d.set_threads(threads, spin_us);
    });
}

int pfx_run(pfx_decoder* decoder, const pfx_step* step) {
    return guarded("pfx_run", decoder, [&](auto& d) {
        pfx::check(step != nullptr, "expected a step, got NULL");
        d.run(*step);
    });
}

int pfx_project(pfx_decoder* decoder, int32_t layer, const void* inputs, int32_t rows, float* keys, float* values) {
    return guarded("pfx_project", decoder, [&](auto& d) { d.project(layer, inputs, rows, keys, values); });
}

void pfx_read_counters(const pfx_decoder* decoder, pfx_counters* counters) {
    if (decoder && counters) *counters = decoder->counters;
}

int64_t pfx_num_bytes(const pfx_decoder* decoder) { return decoder ? decoder->num_bytes() : 0; }

int pfx_set_pool(pfx_decoder* decoder, int32_t num_blocks) {
    return guarded("pfx_set_pool", decoder, [&](auto& d) { d.set_pool(num_blocks); });
}

int pfx_zero_blocks(pfx_decoder* decoder, const int32_t* blocks, int32_t count) {
    return guarded("pfx_zero_blocks", decoder, [&](auto& d) { d.zero_blocks(blocks, count); });
}

int pfx_copy_blocks(pfx_decoder* decoder, const int32_t* sources, const int32_t* targets, int32_t count) {
    return guarded("pfx_copy_blocks", decoder, [&](auto& d) { d.copy_blocks(sources, targets, count); });
}

int pfx_write_kv(pfx_decoder* decoder, const int32_t* table, int32_t start, int32_t count, const void* kv) {
    return guarded("pfx_write_kv", decoder, [&](auto& d) { d.write_kv(table, start, count, kv); });
}

int pfx_read_kv(const pfx_decoder* decoder, const int32_t* table, int32_t start, int32_t count, void* kv) {
    return guarded("pfx_read_kv", decoder, [&](auto& d) { d.read_kv(table, start, count, kv); });
}

int pfx_read_embeddings(const pfx_decoder* decoder, const int32_t* ids, int32_t count, void* out) {
    return guarded("pfx_read_embeddings", decoder, [&](auto& d) { d.read_embeddings(ids, count, out); });
}

}  // extern "C"
