// BatchNorm with given statistics, and the addition and the activation that follow it:
// y = φ(γ (x − μ) / √(σ² + ε) + β + r). Each of μ and σ², γ, β and r may be missing.
#pragma once

#include "batch_norm/batch_norm.hpp"

namespace dfad::DFAD_ISA {

void frozen_batch_norm_forward(Array x, Address y, Address mean, Address variance, Address weight, Address bias,
                               Address residual, double epsilon, double slope, int threads) {
    with_storage(x.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> walk(x.shape[0], x.shape[1]);
        Coefficients<Rows<T>> coefficients(walk, mean, variance, weight, bias, epsilon);
        normalise<T>(walk, coefficients, static_cast<const T*>(x.data), static_cast<const T*>(residual.data), nullptr,
                     static_cast<T*>(y.data), slope, threads);
    });
}

// x_gradient = γ / √(σ² + ε) φ'(y) y_gradient; residual_gradient, which may be missing, is the same without the factor.
// y may be missing where there is no activation.
void frozen_batch_norm_backward(Array y_gradient, Address x_gradient, Address residual_gradient, Address y,
                                Address variance, Address weight, double epsilon, double slope, int threads) {
    with_storage(y_gradient.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using Walk = Rows<T>;
        using V = typename Walk::V;
        const Walk walk(y_gradient.shape[0], y_gradient.shape[1]);
        Coefficients<Walk> coefficients(walk, {}, variance, weight, {}, epsilon);
        const auto* upstream = static_cast<const T*>(y_gradient.data);
        const auto* result = static_cast<const T*>(y.data);
        auto* out = static_cast<T*>(x_gradient.data);
        auto* passed_on = static_cast<T*>(residual_gradient.data);
        const V below = broadcast<V>(slope);
        const auto run = [&](auto activates, auto passes) {
            parallel_stretches(walk.blocks, walk.size, threads, Order::forth, [&](int64_t block) {
                for (int64_t place = 0; place < walk.period; place += Walk::step) {
                    const auto affine = coefficients.at_place(place);
                    walk.each_at(block, place, [=](auto access, int64_t i, int k) {
                        V g = access.read(upstream + i);
                        if constexpr (decltype(activates)::value) g = access.read(result + i) > 0 ? g : below * g;
                        if constexpr (decltype(passes)::value) access.write(passed_on + i, g);
                        access.write(out + i, affine.scale[k] * g);
                    });
                }
            });
        };
        const auto with_result = [&](auto activates) {
            passed_on ? run(activates, std::true_type{}) : run(activates, std::false_type{});
        };
        result ? with_result(std::true_type{}) : with_result(std::false_type{});
    });
}

}  // namespace dfad::DFAD_ISA
