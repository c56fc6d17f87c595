// The loops of a loss that is a sum over the elements of a pair of tensors, both walked in storage order.
#pragma once

#include <type_traits>

#include "buffer.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace dfad::DFAD_ISA {

constexpr int64_t block_elements = 1 << 14;

template <class V, int count>
struct Numbers {
    V of[count];
};

// totals = Σ numbers_of(student, teacher). A block's sum does not depend on the thread, nor the order of the blocks.
template <class T, int count, class F>
void sum_elements(double (&totals)[count], Array student, Array teacher, int threads, F numbers_of) {
    using V = vector_t<T>;
    const auto* s = static_cast<const T*>(student.data);
    const auto* t = static_cast<const T*>(teacher.data);
    const int64_t size = student.size();
    const int64_t blocks = (size + block_elements - 1) / block_elements;
    Buffer<double> partial(blocks * count);
    parallel_for(blocks, size, threads, [=, &partial](int64_t block) {
        const int64_t begin = block * block_elements;
        const int64_t end = begin + block_elements < size ? begin + block_elements : size;
        V sums[count][4] = {};
        int64_t i = begin;
        for (; i + 4 * lanes<V> <= end; i += 4 * lanes<V>)
            for (int k = 0; k < 4; ++k) {
                const Numbers<V, count> numbers = numbers_of(load(s + i + k * lanes<V>), load(t + i + k * lanes<V>));
                for (int n = 0; n < count; ++n) sums[n][k] += numbers.of[n];
            }
        for (; i < end; i += lanes<V>) {
            const Numbers<V, count> numbers = numbers_of(load(s + i, end - i, 0), load(t + i, end - i, 0));
            const auto inside = lane_numbers<V>() < static_cast<scalar_t<T>>(end - i);
            for (int n = 0; n < count; ++n) sums[n][0] += inside ? numbers.of[n] : V{};
        }
        for (int n = 0; n < count; ++n)
            partial[block * count + n] =
                fold((sums[n][0] + sums[n][1]) + (sums[n][2] + sums[n][3]), [](auto a, auto b) { return a + b; });
    });
    for (int64_t block = 0; block < blocks; ++block)
        for (int n = 0; n < count; ++n) totals[n] += partial[block * count + n];
}

// loss = scale · Σ op.value(student, teacher), or the scaled values themselves where loss is not a scalar.
template <template <class> class Op, class... Parameters>
void elementwise_forward(Array loss, Array student, Array teacher, double scale, int threads,
                         Parameters... parameters) {
    with_storage(student.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = vector_t<T>;
        const Op<V> op{parameters...};
        if (loss.dimensions == 0) {
            double total[1] = {};
            sum_elements<T>(total, student, teacher, threads,
                            [=](V s, V t) { return Numbers<V, 1>{op.value(s, t)}; });
            return write_scalar(loss, scale * total[0]);
        }
        const auto* s = static_cast<const T*>(student.data);
        const auto* t = static_cast<const T*>(teacher.data);
        auto* out = static_cast<scalar_t<T>*>(loss.data);
        const V factor = broadcast<V>(scale);
        const int64_t size = student.size();
        const int64_t blocks = (size + block_elements - 1) / block_elements;
        parallel_for(blocks, size, threads, [=](int64_t block) {
            const int64_t begin = block * block_elements;
            const int64_t end = begin + block_elements < size ? begin + block_elements : size;
            int64_t i = begin;
            for (; i + lanes<V> <= end; i += lanes<V>) store(out + i, factor * op.value(load(s + i), load(t + i)));
            if (i < end)
                store(out + i, factor * op.value(load(s + i, end - i, 0), load(t + i, end - i, 0)), end - i);
        });
    });
}

// student_gradient = scale · loss_gradient · op.gradient(student, teacher).
template <template <class> class Op, class... Parameters>
void elementwise_backward(Array student_gradient, Array loss_gradient, Array student, Array teacher,
                          double scale, int threads, Parameters... parameters) {
    with_storage(student.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = vector_t<T>;
        const Op<V> op{parameters...};
        auto* out = static_cast<T*>(student_gradient.data);
        const auto* s = static_cast<const T*>(student.data);
        const auto* t = static_cast<const T*>(teacher.data);
        const auto* g =
            static_cast<const scalar_t<T>*>(loss_gradient.dimensions ? loss_gradient.data : nullptr);
        const V factor = broadcast<V>(g == nullptr ? scale * read_scalar(loss_gradient) : scale);
        const int64_t size = student.size();
        const bool streamed = is_streamed(size * sizeof(T)) && is_aligned(out);
        const int64_t blocks = (size + block_elements - 1) / block_elements;
        parallel_for(blocks, size, threads, [=](int64_t block) {
            const int64_t begin = block * block_elements;
            const int64_t end = begin + block_elements < size ? begin + block_elements : size;
            int64_t i = begin;
            // whole registers without a check for the end of the block: more than twice as fast
            if (g == nullptr && streamed) {
                for (; i + lanes<V> <= end; i += lanes<V>)
                    stream(out + i, factor * op.gradient(load(s + i), load(t + i)));
                finish_streaming();
            } else if (g == nullptr) {
                for (; i + lanes<V> <= end; i += lanes<V>)
                    store(out + i, factor * op.gradient(load(s + i), load(t + i)));
            } else {
                for (; i + lanes<V> <= end; i += lanes<V>)
                    store(out + i, factor * load(g + i) * op.gradient(load(s + i), load(t + i)));
            }
            if (i == end) return;
            const V upstream = g == nullptr ? factor : factor * load(g + i, end - i, 0);
            const V slope = op.gradient(load(s + i, end - i, 0), load(t + i, end - i, 0));
            store(out + i, upstream * slope, end - i);
        });
    });
}

}  // namespace dfad::DFAD_ISA
