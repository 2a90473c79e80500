// Memory of weights, of the KV pool and of one step.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pfx {

// Zeros from the system, which takes memory as it is touched; in large pages where it has them, since
// weights are read from end to end in every step. Freed with the object.
class Mapping {
public:
    explicit Mapping(size_t bytes);  // throws std::bad_alloc
    ~Mapping();
    Mapping(Mapping&& from) noexcept : data_(from.data_), bytes_(from.bytes_) { from.data_ = nullptr; }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    char* data() const { return data_; }
    size_t bytes() const { return bytes_; }

private:
    char* data_;
    size_t bytes_;
};

// Pieces of memory that live as long as the arena, each on a cache line's border.
class Arena {
public:
    void* take(size_t bytes);
    size_t bytes() const { return taken_; }

private:
    std::vector<Mapping> mappings_;
    size_t used_ = 0, taken_ = 0;
};

// An array that grows and is reused; its old content is lost when it grows.
class Buffer {
public:
    ~Buffer();
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    void* at_least(size_t bytes);

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace pfx
