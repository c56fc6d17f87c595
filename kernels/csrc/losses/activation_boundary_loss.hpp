// v² with the violation v = max(0, m − sgn(t) s), sgn(0) = −1. NaN in either tensor gives NaN.
#pragma once

#include "elementwise.hpp"

namespace dfad::DFAD_ISA {

template <class V>
struct ActivationBoundary {
    V margin;

    explicit ActivationBoundary(double m) : margin(broadcast<V>(m)) {}

    V value(V s, V t) const {
        const V v = violation(s, t);
        return v * v;
    }

    V gradient(V s, V t) const {
        const V v = violation(s, t);
        return v * (t > 0 ? V{} - 2 : V{} + 2);
    }

private:
    V violation(V s, V t) const {
        const V v = margin + (t > 0 ? -s : s);
        return (v < 0 ? V{} : v) + (t == t ? V{} : t);
    }
};

void activation_boundary_loss_forward(Array loss, Array student, Array teacher, double margin, double scale, Array,
                                      int threads) {
    elementwise_forward<ActivationBoundary>(loss, student, teacher, scale, threads, margin);
}

void activation_boundary_loss_backward(Array student_gradient, Array loss_gradient, Array student, Array teacher,
                                       double margin, double scale, Array, int threads) {
    elementwise_backward<ActivationBoundary>(student_gradient, loss_gradient, student, teacher, scale, threads, margin);
}

}  // namespace dfad::DFAD_ISA
