// ‖s − t‖² / ‖t‖². NaN in either tensor gives NaN.
#pragma once

#include "elementwise.hpp"

namespace dfad::DFAD_ISA {

template <class V>
struct SquaredError {
    V value(V s, V t) const {
        const V error = s - t;
        return error * error;
    }

    V gradient(V s, V t) const { return (s - t) * 2; }
};

constexpr double smallest_size = 1e-12;

// saved is the divisor of the squared error: the given size, or else the teacher's.
void normalized_squared_error_forward(Array loss, Array student, Array teacher, Array size, double scale, Array saved,
                                      int threads) {
    double sums[2] = {};
    if (loss.dimensions == 0 || !size.exists())
        with_storage(student.dtype, [&](auto* type) {
            using T = std::remove_pointer_t<decltype(type)>;
            using V = vector_t<T>;
            sum_elements<T>(sums, student, teacher, threads, [](V s, V t) {
                return Numbers<V, 2>{SquaredError<V>{}.value(s, t), t * t};
            });
        });
    const double given = size.exists() ? read_scalar(size) : sums[1];
    const double divisor = given < smallest_size ? smallest_size : given;
    write_scalar(saved, divisor);
    if (loss.dimensions == 0) write_scalar(loss, scale * sums[0] / divisor);
    else elementwise_forward<SquaredError>(loss, student, teacher, scale / divisor, threads);
}

void normalized_squared_error_backward(Array student_gradient, Array loss_gradient, Array student, Array teacher,
                                       Array, double scale, Array saved, int threads) {
    elementwise_backward<SquaredError>(student_gradient, loss_gradient, student, teacher, scale / read_scalar(saved),
                                       threads);
}

}  // namespace dfad::DFAD_ISA
