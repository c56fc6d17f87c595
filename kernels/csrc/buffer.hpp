#pragma once

#include <cstdint>
#include <new>

namespace dfad::DFAD_ISA {

// Uninitialised memory aligned for vectors. Not std::vector: its functions would be shared between the
// objects of all instruction sets, and the linker could keep the one that an older processor cannot run.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t size)
        : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{64}))) {}
    ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T& operator[](int64_t i) { return data_[i]; }
    T* data() { return data_; }

private:
    T* data_;
};

}  // namespace dfad::DFAD_ISA
