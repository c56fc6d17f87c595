// T² KL(ỹ ‖ softmax(s/T)) with the soft label ỹ = λ softmax(t/T) + (1 − λ) softmax(t_π/T), over logits of
// shape (rows, classes, sites).
#pragma once

#include <limits>
#include <type_traits>

#include "buffer.hpp"
#include "pairing.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace dfad::DFAD_ISA {

// How logits in memory become vectors. They run over the dimension that is contiguous: over the classes of
// one site, or over neighbouring sites of one class. A unit is what the kernels hold at once: all classes of
// one site, or of as many sites as a cache line has. It is `size` vectors, `width` of them side by side.
template <class T, bool over_classes>
struct Layout {
    using V = vector_t<T>;
    static constexpr int line = 64 / (lanes<V> * sizeof(T));
    static constexpr int width = over_classes || line < 1 ? 1 : line;
    static constexpr int64_t unit_sites = over_classes ? 1 : width * lanes<V>;

    // A value for each site of a unit; one for all lanes where they are classes.
    struct PerSite {
        V values[width] = {};
        V& operator[](int k) { return values[k]; }
        const V& operator[](int k) const { return values[k]; }
    };

    int64_t rows, classes, sites, size, units;

    explicit Layout(const Array& logits)
        : rows(logits.shape[0]),
          classes(logits.shape[1]),
          sites(logits.shape[2]),
          size(over_classes ? (classes + lanes<V> - 1) / lanes<V> : classes * width),
          units((sites + unit_sites - 1) / unit_sites) {}

    // Calls f(vector, its place among the sites) for every vector of a unit.
    template <class F>
    void each(F&& f) const {
        for (int64_t i = 0; i < size; i += width)
            for (int k = 0; k < width; ++k) f(i + k, k);
    }

    // Reads a unit, and returns each site's largest value.
    template <class S>
    PerSite read(const Array& a, int64_t row, int64_t unit, V* to) const {
        const auto fill = over_classes ? -std::numeric_limits<scalar_t<T>>::infinity() : 0;
        const S* from = static_cast<const S*>(a.data) + row * a.stride[0] + unit * unit_sites * a.stride[2];
        const int64_t whole = whole_vectors(unit);
        PerSite top;
        for (int k = 0; k < width; ++k) top[k] = broadcast<V>(-std::numeric_limits<scalar_t<T>>::infinity());
        each([&](int64_t i, int k) {
            const S* p = from + offset(a, i, k);
            if (!over_classes && k == 0)
                __builtin_prefetch(p + unit_sites);  // classes are too far apart for hardware
            const V value = is_whole(i, k, whole) ? load(p) : load(p, left(unit, i, k), fill);
            to[i] = value;
            top[k] = max(top[k], value);
        });
        if (over_classes) top[0] = broadcast<V>(max_of_lanes(top[0]));
        return top;
    }
    // Not fused with the computation of the values: classes are pages apart, and their lines are best written
    // in a burst.
    template <class S>
    void write(const Array& a, int64_t row, int64_t unit, const V* values) const {
        S* to = static_cast<S*>(a.data) + row * a.stride[0] + unit * unit_sites * a.stride[2];
        const int64_t whole = whole_vectors(unit);
        each([=](int64_t i, int k) {
            if (is_whole(i, k, whole)) store(to + offset(a, i, k), values[i]);
            else store(to + offset(a, i, k), values[i], left(unit, i, k));
        });
    }

    // Sums in runs, so that rounding grows with the length of a run and with their number, not with their
    // product.
    template <class F>
    PerSite sum(F&& term) const {
        constexpr int64_t run = 64 * width;
        PerSite total;
        for (int64_t begin = 0; begin < size; begin += run) {
            const int64_t end = begin + run < size ? begin + run : size;
            PerSite part;
            for (int64_t i = begin; i < end; i += width)
                for (int k = 0; k < width; ++k) part[k] += term(i + k, k);
            for (int k = 0; k < width; ++k) total[k] += part[k];
        }
        if (over_classes) total[0] = broadcast<V>(sum_of_lanes(total[0]));
        return total;
    }

    // The sum over a unit's sites of a value of each.
    double over_sites(const PerSite& value, int64_t unit) const {
        if (over_classes) return value[0][0];
        double total = 0;
        for (int k = 0; k < width; ++k)
            for (int lane = 0; lane < lanes<V> && lane < left(unit, k, k); ++lane) total += value[k][lane];
        return total;
    }

private:
    static int64_t offset(const Array& a, int64_t i, int k) {
        return over_classes ? i * lanes<V> : i / width * a.stride[1] + k * lanes<V>;
    }
    // elements from a vector's first lane to the end of the dimension that it runs over
    int64_t left(int64_t unit, int64_t i, int k) const {
        const int64_t count =
            over_classes ? classes - i * lanes<V> : sites - unit * unit_sites - k * lanes<V>;
        return count > 0 ? count : 0;
    }
    int64_t whole_vectors(int64_t unit) const {
        return over_classes ? classes / lanes<V> : (sites - unit * unit_sites) / lanes<V>;
    }
    static bool is_whole(int64_t i, int k, int64_t whole) { return (over_classes ? i : k) < whole; }
};

// One unit of one row: its softmax, from logits that were read into `exponent`, with their largest. What is
// left there is only the exponents of `probability`'s numerator if logarithms are wanted.
template <class L>
struct Softmax {
    using V = typename L::V;
    using PerSite = typename L::PerSite;

    V *exponent, *exponential;
    PerSite log_sum, inverse_sum;

    Softmax(const L& layout, V* exponent, V* exponential, PerSite top, V inverse_temperature, bool logarithms)
        : exponent(exponent), exponential(exponential) {
        const auto exponentiate = [=](int64_t i, int k) {
            const V x = (exponent[i] - top[k]) * inverse_temperature;
            if (logarithms) exponent[i] = x;
            return exponential[i] = exp(x);
        };
        const PerSite sum = layout.sum(exponentiate);
        for (int k = 0; k < L::width; ++k) {
            log_sum[k] = log(sum[k]);
            inverse_sum[k] = 1 / sum[k];
        }
    }
    V probability(int64_t i, int k) const { return exponential[i] * inverse_sum[k]; }
    V log_probability(int64_t i, int k) const { return exponent[i] - log_sum[k]; }
};

// A row's soft label, and how far the student is from it.
template <class L>
struct Mixture {
    using V = typename L::V;
    using PerSite = typename L::PerSite;

    const Softmax<L>*student, *own, *partner;
    PerSite own_factor, partner_factor;

    Mixture(const Softmax<L>& student, const Softmax<L>& own, const Softmax<L>& partner, V coefficient)
        : student(&student), own(&own), partner(&partner) {
        for (int k = 0; k < L::width; ++k) {
            own_factor[k] = coefficient * own.inverse_sum[k];
            partner_factor[k] = (1 - coefficient) * partner.inverse_sum[k];
        }
    }
    V label(int64_t i, int k) const {
        return own_factor[k] * own->exponential[i] + partner_factor[k] * partner->exponential[i];
    }
    // log(ỹ / p): 0 where the label is 0, and exactly 0 where student and label agree
    V log_ratio(V label, int64_t i, int k) const {
        const V ratio = log(label) - student->log_probability(i, k);
        return (label == 0) | (label == student->probability(i, k)) ? V{} : ratio;
    }
};

// The operator's arguments for one layout.
template <class L, class T>
struct InterpolatedKlDiv {
    using V = typename L::V;
    using PerSite = typename L::PerSite;
    using Storage = T;
    using S = scalar_t<T>;

    L layout;
    Array student, teacher, mixing_coefficient;
    V inverse_temperature;
    int64_t memory_slots;

    // A unit of a tensor, read into two slots of the memory.
    Softmax<L> softmax(const Array& a, int64_t row, int64_t unit, V* memory, bool logarithms = false) const {
        const PerSite top = layout.template read<T>(a, row, unit, memory);
        return {layout, memory, memory + layout.size, top, inverse_temperature, logarithms};
    }
    V coefficient(int64_t row) const {
        return broadcast<V>(
            static_cast<const S*>(mixing_coefficient.data)[row * mixing_coefficient.stride[0]]);
    }

    // Calls work(pair, unit, its task's memory, task) for every unit of every pair. A task is a run of units.
    template <class Work>
    void for_each_unit(int64_t pairs, int threads, Work&& work) const {
        const int64_t total = pairs * layout.units;
        parallel_for(tasks(pairs), total * layout.size * lanes<V>, threads, [&](int64_t task) {
            Buffer<V> memory(memory_slots * layout.size);
            const int64_t end = (task + 1) * task_units() < total ? (task + 1) * task_units() : total;
            for (int64_t i = task * task_units(); i < end; ++i)
                work(i / layout.units, i % layout.units, memory.data(), task);
        });
    }
    int64_t tasks(int64_t pairs) const {
        return layout.size ? (pairs * layout.units + task_units() - 1) / task_units() : 0;
    }

private:
    int64_t task_units() const {
        constexpr int64_t task_elements = 1 << 14;
        const int64_t units = task_elements / (layout.size * lanes<V>);
        return units > 1 ? units : 1;
    }
};

// Calls f(problem) for the logits' dtype and layout.
template <class F>
void with_problem(const Array& student, const Array& teacher, const Array& mixing_coefficient,
                  double temperature, int64_t memory_slots, F&& f) {
    with_storage(student.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto call = [&](auto layout) {
            const auto inverse_temperature = broadcast<vector_t<T>>(1 / temperature);
            f(InterpolatedKlDiv<decltype(layout), T>{layout, student, teacher, mixing_coefficient,
                                                     inverse_temperature, memory_slots});
        };
        if (student.stride[1] == 1) call(Layout<T, true>(student));
        else call(Layout<T, false>(student));
    });
}

// loss = scale · T² Σ ỹ log(ỹ / p), or the scaled terms themselves where loss is not a scalar.
void interpolated_kl_div_forward(Array loss, Array student, Array teacher, Array mixing_coefficient,
                                 Indices partner, double temperature, double scale, int threads) {
    const std::vector<Pair> pairs = pair_rows(partner, student.shape[0]);
    const auto pair_count = static_cast<int64_t>(pairs.size());
    with_problem(
        student, teacher, mixing_coefficient, temperature, 6, [&, pairs = pairs.data()](auto problem) {
            using Problem = decltype(problem);
            using V = typename Problem::V;
            using L = decltype(problem.layout);
            const L layout = problem.layout;
            const bool elementwise = loss.dimensions > 0;
            const V factor = broadcast<V>(scale * temperature * temperature);
            const int64_t tasks = problem.tasks(pair_count);
            Buffer<double> partial(tasks);
            for (int64_t task = 0; task < tasks; ++task) partial[task] = 0;
            problem.for_each_unit(pair_count, threads, [&](int64_t i, int64_t unit, V* memory, int64_t task) {
                const Pair pair = pairs[i];
                const bool alone = pair.partner == pair.row;
                const auto own = problem.softmax(teacher, pair.row, unit, memory);
                const auto other =
                    alone ? own : problem.softmax(teacher, pair.partner, unit, memory + 2 * layout.size);
                const auto add = [&](int64_t row, const auto& first, const auto& second) {
                    V* scratch = memory + 4 * layout.size;
                    const auto s = problem.softmax(student, row, unit, scratch, true);
                    const Mixture<L> mixture(s, first, second, problem.coefficient(row));
                    const auto term = [=](int64_t step, int k) {
                        const V label = mixture.label(step, k);
                        return label * mixture.log_ratio(label, step, k);
                    };
                    if (elementwise) {
                        layout.each([=](int64_t step, int k) { scratch[step] = factor * term(step, k); });
                        layout.template write<typename Problem::S>(loss, row, unit, scratch);
                    } else {
                        partial[task] += layout.over_sites(layout.sum(term), unit);
                    }
                };
                add(pair.row, own, other);
                if (pair.closed && !alone) add(pair.partner, other, own);
            });
            if (elementwise) return;
            double total = 0;
            for (int64_t task = 0; task < tasks; ++task) total += partial[task];
            write_scalar(loss, scale * temperature * temperature * total);
        });
}

// The gradients that exist, for loss_gradient g, a scalar or of the logits' shape:
//   student: T (p Σ g ỹ − g ỹ)
//   teacher: T Σ w q (h − Σ q h), h = g (log(ỹ / p) + 1), over the two labels that a teacher's row is mixed
//   into, with
//            its weight w = λ in its own, 1 − λ in the other.
void interpolated_kl_div_backward(Array student_gradient, Array teacher_gradient, Array loss_gradient,
                                  Array student, Array teacher, Array mixing_coefficient, Indices partner,
                                  double temperature, double scale, int threads) {
    const std::vector<Pair> pairs = pair_rows(partner, student.shape[0]);
    const auto pair_count = static_cast<int64_t>(pairs.size());
    with_problem(
        student, teacher, mixing_coefficient, temperature, 11, [&, pairs = pairs.data()](auto problem) {
            using Problem = decltype(problem);
            using T = typename Problem::Storage;
            using V = typename Problem::V;
            using L = decltype(problem.layout);
            const L layout = problem.layout;
            const bool elementwise = loss_gradient.dimensions > 0;
            const V factor =
                broadcast<V>(scale * temperature * (elementwise ? 1 : read_scalar(loss_gradient)));
            problem.for_each_unit(pair_count, threads, [&](int64_t i, int64_t unit, V* memory, int64_t) {
                const Pair pair = pairs[i];
                const bool alone = pair.partner == pair.row;
                const auto slot = [=](int64_t number) { return memory + number * layout.size; };

                // writes the gradient of a label's student, and leaves h in `label_gradient`
                const auto differentiate = [&](int64_t row, const auto& s, const auto& first,
                                               const auto& second, V* label_gradient, bool write) {
                    const Mixture<L> mixture(s, first, second, problem.coefficient(row));
                    V* upstream = slot(10);
                    if (elementwise)
                        layout.template read<typename Problem::S>(loss_gradient, row, unit, upstream);
                    if (teacher_gradient.exists()) {
                        layout.each([=](int64_t step, int k) {
                            label_gradient[step] = mixture.log_ratio(mixture.label(step, k), step, k);
                        });
                        if (elementwise)
                            layout.each([=](int64_t step, int) {
                                label_gradient[step] = upstream[step] * (label_gradient[step] + 1);
                            });
                    }
                    if (!write || !student_gradient.exists()) return;
                    if (elementwise) {
                        const auto weigh = [=](int64_t step, int k) {
                            const V label = mixture.label(step, k);
                            return label == 0 ? V{} : upstream[step] * label;
                        };
                        const auto total = layout.sum(weigh);
                        layout.each([=, &s](int64_t step, int k) {
                            s.exponential[step] =
                                factor * (s.probability(step, k) * total[k] - weigh(step, k));
                        });
                    } else {
                        layout.each([=, &s](int64_t step, int k) {
                            const V p = s.probability(step, k);
                            const V label = mixture.label(step, k);
                            // exactly 0 where both agree, which a multiply-add with p's product misses
                            s.exponential[step] = p == label ? V{} : factor * (p - label);
                        });
                    }
                    layout.template write<T>(student_gradient, row, unit, s.exponential);
                };
                // through a label with gradient h to the teacher's row with probabilities q
                const auto pull = [&](const auto& q, V weight, const V* h, V* gradient, bool add) {
                    const auto weigh = [=, &q](int64_t step, int k, V value) {
                        const V p = q.probability(step, k);
                        return p == 0 ? V{} : p * value;
                    };
                    const auto mean =
                        layout.sum([=](int64_t step, int k) { return weigh(step, k, h[step]); });
                    // takes back what Σ q ≠ 1 in the last place has done to the mean
                    const auto rest =
                        layout.sum([=](int64_t step, int k) { return weigh(step, k, h[step] - mean[k]); });
                    layout.each([=](int64_t step, int k) {
                        const V value = weight * factor * weigh(step, k, h[step] - mean[k] - rest[k]);
                        gradient[step] = add ? gradient[step] + value : value;
                    });
                };
                const auto write_teacher = [&](int64_t row, const auto& q, const V* own_label,
                                               const V* other_label, int64_t other_row) {
                    V* gradient = slot(10);
                    pull(q, problem.coefficient(row), own_label, gradient, false);
                    pull(q, 1 - problem.coefficient(other_row), other_label, gradient, true);
                    layout.template write<T>(teacher_gradient, row, unit, gradient);
                };

                const auto own = problem.softmax(teacher, pair.row, unit, slot(0));
                const auto other = alone ? own : problem.softmax(teacher, pair.partner, unit, slot(2));
                differentiate(pair.row,
                              problem.softmax(student, pair.row, unit, slot(4), teacher_gradient.exists()),
                              own, other, slot(6), true);
                if (alone) {
                    if (teacher_gradient.exists()) write_teacher(pair.row, own, slot(6), slot(6), pair.row);
                } else if (pair.closed) {
                    differentiate(
                        pair.partner,
                        problem.softmax(student, pair.partner, unit, slot(4), teacher_gradient.exists()),
                        other, own, slot(7), true);
                    if (!teacher_gradient.exists()) return;
                    write_teacher(pair.row, own, slot(6), slot(7), pair.partner);
                    write_teacher(pair.partner, other, slot(7), slot(6), pair.row);
                } else if (teacher_gradient.exists()) {
                    const auto inverse = problem.softmax(teacher, pair.inverse, unit, slot(8));
                    differentiate(pair.inverse, problem.softmax(student, pair.inverse, unit, slot(4), true),
                                  inverse, own, slot(7), false);
                    write_teacher(pair.row, own, slot(6), slot(7), pair.inverse);
                }
            });
        });
}

}  // namespace dfad::DFAD_ISA
