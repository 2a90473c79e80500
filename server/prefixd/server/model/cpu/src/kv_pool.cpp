// The KV pool: for each layer the keys of all blocks, then the values.
#include <cstring>

#include "decoder.h"

namespace pfx {

size_t Decoder::block_elements() const {
    return (size_t)attention_.num_kv_heads * attention_.block_size * attention_.head_dim;
}

Pool Decoder::pool_of(int layer) const {
    const size_t bytes = num_blocks_ * block_elements() * weights.element_size();
    char* keys = kv_->data() + 2 * layer * bytes;
    return {keys, keys + bytes};
}

void Decoder::set_pool(int num_blocks) {
    check(!kv_, "expected the pool's size once, got it again");
    check(num_blocks >= 1, expected("num_blocks", "at least 1", num_blocks));
    kv_ = std::make_unique<Mapping>(2 * weights.shape.num_layers * num_blocks * block_elements() *
                                    weights.element_size());
    num_blocks_ = num_blocks;
}

void Decoder::check_blocks(const char* name, const int32_t* blocks, int count) const {
    check(kv_ != nullptr, "expected pfx_set_pool before, got none");
    check(count >= 0, expected("count", "0 or more", count));
    check(count == 0 || blocks, std::string("expected ") + name + ", got NULL");
    for (int i = 0; i < count; i++)
        check(blocks[i] >= 0 && blocks[i] < num_blocks_,
              expected(name, "0 to " + std::to_string(num_blocks_ - 1), blocks[i]));
}

void Decoder::check_table(const int32_t* table, int start, int count) const {
    check(start >= 0, expected("start", "0 or more", start));
    check(count >= 0 && count <= INT32_MAX - start, expected("count", "0 or more", count));
    check_blocks("block of the table", table, (start + count + attention_.block_size - 1) / attention_.block_size);
}

void Decoder::zero_blocks(const int32_t* blocks, int count) {
    check_blocks("block", blocks, count);
    const size_t bytes = block_elements() * weights.element_size();
    for (int layer = 0; layer < weights.shape.num_layers; layer++) {
        const Pool pool = pool_of(layer);
        for (int i = 0; i < count; i++) {
            std::memset((char*)pool.keys + blocks[i] * bytes, 0, bytes);
            std::memset((char*)pool.values + blocks[i] * bytes, 0, bytes);
        }
    }
}

void Decoder::copy_blocks(const int32_t* sources, const int32_t* targets, int count) {
    check_blocks("source", sources, count);
    check_blocks("target", targets, count);
    const size_t bytes = block_elements() * weights.element_size();
    for (int layer = 0; layer < weights.shape.num_layers; layer++) {
        const Pool pool = pool_of(layer);
        for (int i = 0; i < count; i++) {
            if (sources[i] == targets[i]) continue;
            for (void* of : {pool.keys, pool.values})
                std::memcpy((char*)of + targets[i] * bytes, (char*)of + sources[i] * bytes, bytes);
        }
    }
}

void Decoder::write_kv(const int32_t* table, int start, int count, const void* kv) {
    check_table(table, start, count);
    check(count == 0 || kv, "expected kv, got NULL");
    const size_t bytes = (size_t)count * attention_.num_kv_heads * attention_.head_dim * weights.element_size();
    for (int layer = 0; layer < weights.shape.num_layers; layer++) {
        const char* keys = (const char*)kv + 2 * layer * bytes;
        weights.kernels.write_kv(pool_of(layer), attention_, table, start, count, keys, keys + bytes);
    }
}

void Decoder::read_kv(const int32_t* table, int start, int count, void* kv) const {
    check_table(table, start, count);
    check(count == 0 || kv, "expected kv, got NULL");
    const size_t bytes = (size_t)count * attention_.num_kv_heads * attention_.head_dim * weights.element_size();
    for (int layer = 0; layer < weights.shape.num_layers; layer++) {
        char* keys = (char*)kv + 2 * layer * bytes;
        weights.kernels.read_kv(pool_of(layer), attention_, table, start, count, keys, keys + bytes);
    }
}

void Decoder::read_embeddings(const int32_t* ids, int count, void* out) const {
    check(weights.final_norm, "expected pfx_set_ends before, got none");
    check(count >= 0, expected("count", "0 or more", count));
    check(count == 0 || (ids && out), "expected ids and out, got NULL");
    const size_t width = weights.shape.width;
    std::vector<float> row(width);
    for (int i = 0; i < count; i++) {
        check(ids[i] >= 0 && ids[i] < weights.shape.embeddings,
              expected("id", "0 to " + std::to_string(weights.shape.embeddings - 1), ids[i]));
        weights.read_embedding(ids[i], row.data());
        if (weights.shape.dtype == PFX_F32) {
            std::memcpy((float*)out + i * width, row.data(), width * sizeof(float));
        } else {
            for (size_t j = 0; j < width; j++) {  // widened from bfloat16: the lower half is zero
                uint32_t bits;
                std::memcpy(&bits, &row[j], sizeof bits);
                ((bf16*)out)[i * width + j] = bits >> 16;
            }
        }
    }
}

int64_t Decoder::num_bytes() const { return weights.arena.bytes() + (kv_ ? kv_->bytes() : 0); }

}  // namespace pfx
