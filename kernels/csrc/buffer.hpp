#pragma once

#include <cstdint>
#include <new>

namespace dfad::DFAD_ISA {

// Memory that a thread has freed, kept for its next request of the same size: the system would take it back between two
// calls of a kernel, and clear it page by page when it is touched again.
class Spares {
public:
    ~Spares() {
        for (Spare& spare : spares_) release(spare.data);
    }
    // At least `bytes`, which is set to the size that was found.
    void* take(int64_t& bytes) {
        for (Spare& spare : spares_)
            if (spare.bytes >= bytes && spare.bytes <= 2 * bytes) {
                void* data = spare.data;
                bytes = spare.bytes;
                spare = {};
                return data;
            }
        return ::operator new(bytes, alignment);
    }
    void give(void* data, int64_t bytes) {
#if !defined(__SANITIZE_ADDRESS__)  // which watches freed memory
        if (bytes > most_bytes) return release(data);
        Spare& oldest = spares_[next_];
        next_ = (next_ + 1) % count;
        release(oldest.data);
        oldest = {data, bytes};
#else
        static_cast<void>(bytes);
        release(data);
#endif
    }

private:
    struct Spare {
        void* data = nullptr;
        int64_t bytes = 0;
    };
    static constexpr std::align_val_t alignment{64};
    static constexpr int count = 16;
    static constexpr int64_t most_bytes = 1 << 22;

    static void release(void* data) { ::operator delete(data, alignment); }

    Spare spares_[count];
    int next_ = 0;
};

inline thread_local Spares spares;

// Uninitialised memory aligned for vectors. Not std::vector: its functions would be shared between the
// objects of all instruction sets, and the linker could keep the one that an older processor cannot run.
template <class T>
class Buffer {
public:
    explicit Buffer(int64_t size) : bytes_(size * static_cast<int64_t>(sizeof(T))) {
        data_ = static_cast<T*>(spares.take(bytes_));
    }
    ~Buffer() { spares.give(data_, bytes_); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T& operator[](int64_t i) { return data_[i]; }
    T* data() { return data_; }

private:
    int64_t bytes_;
    T* data_;
};

}  // namespace dfad::DFAD_ISA
