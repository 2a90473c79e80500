#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace pfx {

constexpr size_t kChunk = 64 << 20;

static size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

Mapping::Mapping(size_t bytes) : bytes_(rounded_up(std::max<size_t>(bytes, 1), 4096)) {
    void* data = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    madvise(data, bytes_, MADV_HUGEPAGE);
    data_ = static_cast<char*>(data);
}

Mapping::~Mapping() {
    if (data_) munmap(data_, bytes_);
}

void* Arena::take(size_t bytes) {
    bytes = rounded_up(bytes, kLine);
    if (mappings_.empty() || used_ + bytes > mappings_.back().bytes()) {
        mappings_.emplace_back(std::max(bytes, kChunk));
        used_ = 0;
    }
    void* piece = mappings_.back().data() + used_;
    used_ += bytes;
    taken_ += bytes;
    return piece;
}

static void grow(void*& data, size_t& size, size_t bytes) {
    if (bytes <= size) return;
    std::free(data);
    size = 0;
    data = std::aligned_alloc(kLine, rounded_up(bytes + bytes / 4, kLine));
    if (!data) throw std::bad_alloc();
    size = bytes;
}

Buffer::~Buffer() { std::free(data_); }

void* Buffer::at_least(size_t bytes) {
    grow(data_, bytes_, bytes);
    return data_;
}

Scratch::~Scratch() { std::free(data); }

void* Scratch::at_least(size_t bytes) {
    grow(data, size, bytes);
    return data;
}

}  // namespace pfx
