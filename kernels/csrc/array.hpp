// What crosses the border between Python and the kernels: a tensor without its type, and the choice of its
// type.
#pragma once

#include <cstdint>

namespace dfad {

enum class Dtype { float32, float64, bfloat16, float16 };

// A view of a tensor; strides count elements. A scalar has no dimensions.
struct Array {
    void* data = nullptr;
    Dtype dtype = Dtype::float32;
    int dimensions = 0;
    int64_t shape[3] = {1, 1, 1};
    int64_t stride[3] = {0, 0, 0};

    int64_t size() const { return shape[0] * shape[1] * shape[2]; }
    bool exists() const { return data != nullptr; }
};

// Where a dense tensor begins, told by a number: of what is known to fit another tensor nothing else need be asked.
struct Address {
    void* data = nullptr;

    bool exists() const { return data != nullptr; }
};

// A one-dimensional view of int64 indices; none where data is null.
struct Indices {
    const int64_t* data = nullptr;
    int64_t size = 0;
};

}  // namespace dfad
