// How tensors are passed from Python to the kernels: without their type, which is chosen here.
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

// The address of a dense tensor whose shape and type are known from another tensor.
struct Address {
    void* data = nullptr;

    bool exists() const { return data != nullptr; }
};

// A one-dimensional view of int64 indices; empty if data is null.
struct Indices {
    const int64_t* data = nullptr;
    int64_t size = 0;
};

}  // namespace dfad
