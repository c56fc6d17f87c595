// T² KL(ỹ ‖ softmax(s/T)) with the soft label ỹ = λ softmax(t/T) + (1 − λ) softmax(t_π/T), over logits of shape
// (rows, classes, sites).
#pragma once

#include <limits>
#include <type_traits>

#include "buffer.hpp"
#include "pairing.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace dfad::DFAD_ISA {

// Softmax of logits that were loaded into `exponent`, one vector a step.
template <class V> struct Softmax {
    V *exponent, *exponential;
    V log_sum, inverse_sum;

    V probability(int64_t step) const { return exponential[step] * inverse_sum; }
    V log_probability(int64_t step) const { return exponent[step] - log_sum; }
};

// A row's soft label and how far the student is from it. The logarithm of the ratio is 0 where the label is, and
// exactly 0 where label and student agree.
template <class V> struct Mixture {
    Softmax<V>* student;
    Softmax<V>* own;
    Softmax<V>* partner;
    V coefficient;

    V label(int64_t step) const {
        return coefficient * own->probability(step) + (1 - coefficient) * partner->probability(step);
    }
    V log_ratio(V label, int64_t step) const {
        const V ratio = log(label) - student->log_probability(step);
        return (label == 0) | (label == student->probability(step)) ? V{} : ratio;
    }
};

// How logits in memory become vectors. Vectors run over the dimension that is contiguous: over the classes of one
// site, or over neighbouring sites of one class. A unit is what a vector's lanes and all steps cover together.
template <class T, bool over_classes> struct Layout {
    using V = vector_t<T>;
    int64_t rows, classes, sites, steps, units;

    explicit Layout(const Array& logits)
        : rows(logits.shape[0]), classes(logits.shape[1]), sites(logits.shape[2]),
          steps(over_classes ? (classes + lanes<V> - 1) / lanes<V> : classes),
          units(over_classes ? sites : (sites + lanes<V> - 1) / lanes<V>) {}

    int64_t offset(const Array& a, int64_t row, int64_t unit, int64_t step) const {
        return row * a.stride[0] + (over_classes ? unit * a.stride[2] + step * lanes<V>
                                                 : unit * lanes<V> + step * a.stride[1]);
    }
    int64_t count(int64_t unit, int64_t step) const {
        return over_classes ? classes - step * lanes<V> : sites - unit * lanes<V>;
    }
    template <class S> V read(const Array& a, int64_t row, int64_t unit, int64_t step) const {
        const auto fill = over_classes ? -std::numeric_limits<scalar_t<T>>::infinity() : 0;
        return load(static_cast<const S*>(a.data) + offset(a, row, unit, step), count(unit, step), fill);
    }
    template <class S> void write(const Array& a, int64_t row, int64_t unit, int64_t step, V value) const {
        store(static_cast<S*>(a.data) + offset(a, row, unit, step), value, count(unit, step));
    }
    V total(V sums) const { return over_classes ? broadcast<V>(sum_of_lanes(sums)) : sums; }
    V largest(V v) const { return over_classes ? broadcast<V>(max_of_lanes(v)) : v; }

    // Sums over steps in runs, so that rounding grows with the run's length and the number of runs alone.
    template <class F> V sum(F&& term) const {
        constexpr int64_t run = 64;
        V sums{};
        for (int64_t begin = 0; begin < steps; begin += run) {
            const int64_t end = begin + run < steps ? begin + run : steps;
            V part{};
            for (int64_t step = begin; step < end; ++step) part += term(step);
            sums += part;
        }
        return total(sums);
    }

    Softmax<V> softmax(const Array& a, int64_t row, int64_t unit, V* exponent, V* exponential, V inverse_temperature) const {
        V top = broadcast<V>(-std::numeric_limits<scalar_t<T>>::infinity());
        for (int64_t step = 0; step < steps; ++step) {
            exponent[step] = read<T>(a, row, unit, step);
            top = max(top, exponent[step]);
        }
        top = largest(top);
        const V sums = sum([=](int64_t step) {
            exponent[step] = (exponent[step] - top) * inverse_temperature;
            return exponential[step] = exp(exponent[step]);
        });
        return {exponent, exponential, log(sums), 1 / sums};
    }
};

// Calls work(task's own state, pair, unit) for every unit of every pair; a task is a run of units with one state.
template <class MakeState, class Work>
void for_each_unit(int64_t pairs, int64_t units, int64_t unit_elements, int threads, MakeState&& make_state, Work&& work) {
    constexpr int64_t task_elements = 1 << 13;
    const int64_t total = pairs * units;
    if (total * unit_elements == 0) return;
    const int64_t task_units = unit_elements < task_elements ? task_elements / unit_elements : 1;
    const int64_t tasks = (total + task_units - 1) / task_units;
    parallel_for(tasks, total * unit_elements, threads, [&](int64_t task) {
        auto state = make_state(task);
        const int64_t end = (task + 1) * task_units < total ? (task + 1) * task_units : total;
        for (int64_t i = task * task_units; i < end; ++i) work(state, i / units, i % units);
    });
}

template <class F> void with_layout(const Array& logits, F&& f) {
    with_storage(logits.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        if (logits.stride[1] == 1) f(Layout<T, true>(logits), type);
        else f(Layout<T, false>(logits), type);
    });
}

template <class V> V coefficient_of(const Array& mixing_coefficient, int64_t row) {
    using S = decltype(V{}[0] + 0);
    return broadcast<V>(static_cast<const S*>(mixing_coefficient.data)[row * mixing_coefficient.stride[0]]);
}

// loss = scale · Σ, or the scaled terms ỹ log(ỹ / p) themselves where loss is not a scalar.
void interpolated_kl_div_forward(Array loss, Array student, Array teacher, Array mixing_coefficient, Indices partner,
                                 double temperature, double scale, int threads) {
    const std::vector<Pair> pair_list = pair_rows(partner, student.shape[0]);
    const Pair* pairs = pair_list.data();
    const int64_t pair_count = static_cast<int64_t>(pair_list.size());
    with_layout(student, [&](auto layout, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = vector_t<T>;
        const bool elementwise = loss.dimensions > 0;
        const V inverse_temperature = broadcast<V>(1 / temperature);
        const V factor = broadcast<V>(scale * temperature * temperature);
        const int64_t steps = layout.steps;
        struct State {
            Buffer<V> memory;
            double* loss;
        };
        const int64_t capacity = pair_count * layout.units + 1;  // at least one unit a task
        Buffer<double> partial(capacity);
        for (int64_t i = 0; i < capacity; ++i) partial[i] = 0;
        const auto make_state = [&](int64_t task) { return State{Buffer<V>(7 * steps), &partial[task]}; };
        for_each_unit(pair_count, layout.units, steps * lanes<V>, threads, make_state, [&](State& state, int64_t i, int64_t unit) {
            const Pair pair = pairs[i];
            V* memory = state.memory.data();
            const auto slot = [=](int64_t k) { return memory + k * steps; };
            auto own = layout.softmax(teacher, pair.row, unit, slot(0), slot(1), inverse_temperature);
            auto other = pair.partner == pair.row
                ? own : layout.softmax(teacher, pair.partner, unit, slot(2), slot(3), inverse_temperature);
            const auto add = [&](int64_t row, Softmax<V>* first, Softmax<V>* second) {
                auto s = layout.softmax(student, row, unit, slot(4), slot(5), inverse_temperature);
                const Mixture<V> mixture{&s, first, second, coefficient_of<V>(mixing_coefficient, row)};
                V sums{};
                for (int64_t step = 0; step < steps; ++step) {
                    const V label = mixture.label(step);
                    V term = label * mixture.log_ratio(label, step);
                    if (elementwise) layout.template write<scalar_t<T>>(loss, row, unit, step, factor * term);
                    else sums += lane_numbers<V>() < static_cast<scalar_t<T>>(layout.count(unit, step)) ? term : V{};
                }
                *state.loss += sum_of_lanes(sums);
            };
            add(pair.row, &own, &other);
            if (pair.closed && pair.partner != pair.row) add(pair.partner, &other, &own);
        });
        if (elementwise) return;
        double total = 0;
        for (int64_t i = 0; i < capacity; ++i) total += partial[i];
        write_scalar(loss, scale * temperature * temperature * total);
    });
}

// The gradients that exist, for loss_gradient (g), a scalar or of the logits' shape:
//   student: T (p Σ g ỹ − g ỹ)
//   teacher: T Σ w q (h − Σ q h), h = g (log(ỹ / p) + 1), over the two labels that a teacher's row is mixed into, with
//            its weight w = λ in its own, 1 − λ in the other.
void interpolated_kl_div_backward(Array student_gradient, Array teacher_gradient, Array loss_gradient, Array student,
                                  Array teacher, Array mixing_coefficient, Indices partner, double temperature,
                                  double scale, int threads) {
    const std::vector<Pair> pair_list = pair_rows(partner, student.shape[0]);
    const Pair* pairs = pair_list.data();
    const int64_t pair_count = static_cast<int64_t>(pair_list.size());
    with_layout(student, [&](auto layout, auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using V = vector_t<T>;
        const bool elementwise = loss_gradient.dimensions > 0;
        const V inverse_temperature = broadcast<V>(1 / temperature);
        const V factor = broadcast<V>(scale * temperature * (elementwise ? 1 : read_scalar(loss_gradient)));
        const V constant = broadcast<V>(elementwise ? 1 : 0);  // Σ g ỹ cancels it where g is constant
        const int64_t steps = layout.steps;
        const auto make_state = [&](int64_t) { return Buffer<V>(12 * steps); };
        for_each_unit(pair_count, layout.units, steps * lanes<V>, threads, make_state, [&](Buffer<V>& state, int64_t i, int64_t unit) {
            const Pair pair = pairs[i];
            V* memory = state.data();
            const auto slot = [=](int64_t k) { return memory + k * steps; };
            const auto softmax = [&](const Array& a, int64_t row, int64_t k) {
                return layout.softmax(a, row, unit, slot(k), slot(k + 1), inverse_temperature);
            };
            const auto upstream = [&](int64_t row, int64_t step) {
                return elementwise ? layout.template read<scalar_t<T>>(loss_gradient, row, unit, step) : broadcast<V>(1);
            };
            // what one label's row gives to its student; leaves h in slot k
            const auto differentiate = [&](int64_t row, bool write_student, Softmax<V>* s, Softmax<V>* first, Softmax<V>* second, int64_t k) {
                const Mixture<V> mixture{s, first, second, coefficient_of<V>(mixing_coefficient, row)};
                if (write_student && student_gradient.exists()) {
                    const V total = elementwise
                        ? layout.sum([&](int64_t step) { return select(mixture.label(step) == 0, V{}, upstream(row, step) * mixture.label(step)); })
                        : broadcast<V>(1);
                    for (int64_t step = 0; step < steps; ++step) {
                        const V gradient = s->probability(step) * total - select(mixture.label(step) == 0, V{}, upstream(row, step) * mixture.label(step));
                        layout.template write<T>(student_gradient, row, unit, step, factor * gradient);
                    }
                }
                if (teacher_gradient.exists())
                    for (int64_t step = 0; step < steps; ++step)
                        slot(k)[step] = upstream(row, step) * (mixture.log_ratio(mixture.label(step), step) + constant);
            };
            // through one label to the teacher's row with probabilities q
            const auto pull = [&](const Softmax<V>& q, V weight, int64_t k) {
                const V* h = slot(k);
// the second sum takes back what Σ q ≠ 1 in the last place has done to the first
                const auto weigh = [&](V shift) {
                    return layout.sum([&](int64_t step) {
                        const V p = q.probability(step);
                        return select(p == 0, V{}, p * (h[step] - shift));
                    });
                };
                const V first = weigh(V{});
                const V mean = first + weigh(first);
                return [=, &q](int64_t step) { const V p = q.probability(step); return select(p == 0, V{}, weight * p * (h[step] - mean)); };
            };
            const auto write_teacher = [&](int64_t row, auto first, auto second) {
                for (int64_t step = 0; step < steps; ++step)
                    layout.template write<T>(teacher_gradient, row, unit, step, factor * (first(step) + second(step)));
            };
            const auto coefficient = [&](int64_t row) { return coefficient_of<V>(mixing_coefficient, row); };

            auto own = softmax(teacher, pair.row, 0);
            auto other = pair.partner == pair.row ? own : softmax(teacher, pair.partner, 2);
            {
                auto s = softmax(student, pair.row, 4);
                differentiate(pair.row, true, &s, &own, &other, 6);
            }
            if (pair.partner == pair.row) {
                if (teacher_gradient.exists())
                    write_teacher(pair.row, pull(own, coefficient(pair.row), 6), pull(own, 1 - coefficient(pair.row), 6));
            } else if (pair.closed) {
                auto s = softmax(student, pair.partner, 4);
                differentiate(pair.partner, true, &s, &other, &own, 7);
                if (teacher_gradient.exists()) {
                    write_teacher(pair.row, pull(own, coefficient(pair.row), 6), pull(own, 1 - coefficient(pair.partner), 7));
                    write_teacher(pair.partner, pull(other, coefficient(pair.partner), 7), pull(other, 1 - coefficient(pair.row), 6));
                }
            } else if (teacher_gradient.exists()) {
                auto inverse = softmax(teacher, pair.inverse, 8);
                auto s = softmax(student, pair.inverse, 10);
                differentiate(pair.inverse, false, &s, &inverse, &own, 7);
                write_teacher(pair.row, pull(own, coefficient(pair.row), 6), pull(own, 1 - coefficient(pair.inverse), 7));
            }
        });
    });
}

}  // namespace dfad::DFAD_ISA
