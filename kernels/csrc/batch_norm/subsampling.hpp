// Every step-th pixel, among channels of zeros, and back.
#pragma once

#include <cstring>

#include "array.hpp"
#include "parallel.hpp"

namespace dfad::DFAD_ISA {

// x: (count, height, width, in) of elements of so many bytes; y: its pixels' channels from `before` on.
void subsampling_forward(Address x, Address y, int64_t count, int64_t height, int64_t width, int64_t in, int64_t out,
                         int64_t before, int64_t step, int64_t bytes, int threads) {
    const int64_t rows = (height + step - 1) / step, columns = (width + step - 1) / step;
    parallel_stretches(count, count * rows * columns * out, threads, Order::forth, [&](int64_t n) {
        for (int64_t row = 0; row < rows; ++row) {
            const char* from = static_cast<const char*>(x.data) + (n * height + row * step) * width * in * bytes;
            char* to = static_cast<char*>(y.data) + (n * rows + row) * columns * out * bytes;
            std::memset(to, 0, columns * out * bytes);
            for (int64_t column = 0; column < columns; ++column)
                std::memcpy(to + (column * out + before) * bytes, from + column * step * in * bytes, in * bytes);
        }
    });
}

void subsampling_backward(Address x_gradient, Address y_gradient, int64_t count, int64_t height, int64_t width,
                          int64_t in, int64_t out, int64_t before, int64_t step, int64_t bytes, int threads) {
    const int64_t rows = (height + step - 1) / step, columns = (width + step - 1) / step;
    parallel_stretches(count, count * height * width * in, threads, Order::forth, [&](int64_t n) {
        for (int64_t row = 0; row < height; ++row) {
            char* to = static_cast<char*>(x_gradient.data) + (n * height + row) * width * in * bytes;
            std::memset(to, 0, width * in * bytes);
            if (row % step) continue;
            const char* from =
                static_cast<const char*>(y_gradient.data) + (n * rows + row / step) * columns * out * bytes;
            for (int64_t column = 0; column < columns; ++column)
                std::memcpy(to + column * step * in * bytes, from + (column * out + before) * bytes, in * bytes);
        }
    });
}

}  // namespace dfad::DFAD_ISA
