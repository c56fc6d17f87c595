// T² KL(ỹ ‖ softmax(s/T)) with the soft label ỹ = λ softmax(t/T) + (1 − λ) softmax(t_π/T), over logits of
// shape (rows, classes, sites). Exponents and logarithms are to the base 2 until a result is scaled.
#pragma once

#include <limits>
#include <type_traits>

#include "buffer.hpp"
#include "pairing.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace dfad::DFAD_ISA {

constexpr double ln2 = 0.693147180559945309417;

// How logits are loaded into vectors. They run over the dimension that is contiguous: over the classes of
// one site, or over neighbouring sites of one class. A unit is what the kernels hold at once: all classes of
// one site, or of as many sites as a step has lanes. It is `steps` times `width` vectors, in either case side by
// side in memory.
template <class T, bool over_classes, int vectors = 4>
struct Layout {
    using V = vector_t<T>;
    static constexpr int width = vectors;
    static constexpr int64_t step_lanes = width * lanes<V>;
    static constexpr int64_t unit_sites = over_classes ? 1 : step_lanes;

    // A vector's place in a unit: its step, and its place there. Of a vector that is not whole only the first
    // `count` lanes are in memory.
    template <bool whole>
    struct Place {
        int64_t step;
        int k;
        int64_t count;
        int64_t index() const { return step * width + k; }
    };

    // A value for each site of a unit; one for all lanes and vectors where they are classes.
    struct PerSite {
        V values[over_classes ? 1 : width] = {};
        V& operator[](int k) { return values[over_classes ? 0 : k]; }
        const V& operator[](int k) const { return values[over_classes ? 0 : k]; }
    };

    int64_t rows, classes, sites, steps, units;

    explicit Layout(const Array& logits)
        : rows(logits.shape[0]),
          classes(logits.shape[1]),
          sites(logits.shape[2]),
          steps(over_classes ? (classes + step_lanes - 1) / step_lanes : classes),
          units((sites + unit_sites - 1) / unit_sites) {}

    int64_t size() const { return steps * width; }

    // Calls f(place) for every vector of some steps of a unit, or of all.
    template <class F>
    void each(int64_t unit, int64_t begin, int64_t end, F&& f) const {
        for (int64_t step = begin; step < end; ++step) {
            const int64_t count = over_classes ? classes - step * step_lanes : sites - unit * unit_sites;
            if (count >= step_lanes)
                for (int k = 0; k < width; ++k) f(Place<true>{step, k, lanes<V>});
            else
                for (int k = 0; k * lanes<V> < count; ++k) f(Place<false>{step, k, count - k * lanes<V>});
        }
    }
    template <class F>
    void each(int64_t unit, F&& f) const {
        each(unit, 0, steps, f);
    }

    // Sums in runs, so that rounding grows with the length of a run and with their number, not with their
    // product.
    template <class F>
    PerSite sum(int64_t unit, F&& term) const {
        constexpr int64_t run = 64;
        V total[width] = {};
        for (int64_t begin = 0; begin < steps; begin += run) {
            V part[width] = {};
            each(unit, begin, begin + run < steps ? begin + run : steps,
                 [&](auto at) { part[at.k] += term(at); });
            for (int k = 0; k < width; ++k) total[k] += part[k];
        }
        return reduce(total, [](auto a, auto b) { return a + b; });
    }

    // Each site's value, from vectors that were combined for each place.
    template <class F>
    static PerSite reduce(const V (&parts)[width], F&& combine) {
        PerSite result;
        if (over_classes) {
            V all = parts[0];
            for (int k = 1; k < width; ++k) all = combine(all, parts[k]);
            result[0] = V{} + fold(all, combine);
        } else {
            for (int k = 0; k < width; ++k) result[k] = parts[k];
        }
        return result;
    }

    // The sum over a unit's sites of a value of each.
    double over_sites(const PerSite& value, int64_t unit) const {
        if (over_classes) return value[0][0];
        double total = 0;
        for (int k = 0; k < width; ++k)
            for (int lane = 0; lane < lanes<V> && unit * unit_sites + k * lanes<V> + lane < sites; ++lane)
                total += value[k][lane];
        return total;
    }

    // One unit of a tensor of the logits' shape.
    template <class S>
    struct View {
        S* data;
        int64_t stride;
        bool streamed;

        template <bool whole>
        V read(Place<whole> at, scalar_t<S> fill) const {
            const S* p = address(at);
            // the next unit's cache line: classes are too far apart for the hardware prefetcher
            if (!over_classes && at.k * lanes<V> * sizeof(S) % 64 == 0) __builtin_prefetch(p + unit_sites);
            return whole ? load(p) : load(p, at.count, fill);
        }
        template <bool whole>
        void write(Place<whole> at, V value) const {
            if (!whole) store(address(at), value, at.count);
            else if (streamed) stream(address(at), value);
            else store(address(at), value);
        }

    private:
        template <bool whole>
        S* address(Place<whole> at) const {
            return data + at.step * stride + at.k * lanes<V>;
        }
    };
    template <class S>
    View<S> view(const Array& a, int64_t row, int64_t unit) const {
        S* data = static_cast<S*>(a.data) + row * a.stride[0] + unit * unit_sites * a.stride[2];
        const int64_t stride = over_classes ? step_lanes : a.stride[1];
        return {data, stride, is_streamed(a.size() * sizeof(S)) && is_aligned(data) && is_aligned(data + stride)};
    }

    // Statistic number `which` of a unit, in an array of shape (statistics, rows · sites).
    PerSite saved(const Array& array, int which, int64_t row, int64_t unit) const {
        PerSite value;
        const auto* p = statistic(array, which, row, unit);
        if (over_classes) value[0] = broadcast<V>(*p);
        else
            for (int k = 0; k < width; ++k) value[k] = load(p + k * lanes<V>, left(unit, k), 1);
        return value;
    }
    void save(const Array& array, int which, int64_t row, int64_t unit, const PerSite& value) const {
        auto* p = statistic(array, which, row, unit);
        if (over_classes) *p = value[0][0];
        else
            for (int k = 0; k < width; ++k) store(p + k * lanes<V>, value[k], left(unit, k));
    }

private:
    scalar_t<T>* statistic(const Array& array, int which, int64_t row, int64_t unit) const {
        return static_cast<scalar_t<T>*>(array.data) + which * array.stride[0] + row * sites + unit * unit_sites;
    }
    int64_t left(int64_t unit, int k) const {
        const int64_t count = sites - unit * unit_sites - k * lanes<V>;
        return count > 0 ? count : 0;
    }
};

// Statistics of a unit's logits from a first pass: their softmax is e^{(x − top) / T} · inverse_sum.
template <class L>
struct Statistics {
    typename L::PerSite top, inverse_sum;
};

// The softmax of a unit whose exponentials are in memory, and the exponents if they are wanted.
template <class L>
struct Softmax : Statistics<L> {
    using V = typename L::V;

    V *exponential, *exponent;
    typename L::PerSite sum;

    template <class Place>
    V probability(Place at) const {
        return exponential[at.index()] * this->inverse_sum[at.k];
    }
};

// The soft label of a row.
template <class L>
struct Label {
    using V = typename L::V;

    typename L::PerSite own_factor, partner_factor;

    Label(const Statistics<L>& own, const Statistics<L>& partner, V coefficient) {
        for (int k = 0; k < L::width; ++k) {
            own_factor[k] = coefficient * own.inverse_sum[k];
            partner_factor[k] = (1 - coefficient) * partner.inverse_sum[k];
        }
    }
    V operator()(V own_exponential, V partner_exponential, int k) const {
        return own_factor[k] * own_exponential + partner_factor[k] * partner_exponential;
    }
};

// The operator's arguments for one layout.
template <class L, class T>
struct InterpolatedKlDiv {
    using Row = L;
    using Storage = T;
    using V = typename L::V;
    using S = scalar_t<T>;
    static constexpr S excluded = -std::numeric_limits<S>::infinity();

    L layout;
    Array student, teacher, mixing_coefficient, saved;
    V rate;  // of the exponents: log2 e / T

    auto logits(const Array& a, int64_t row, int64_t unit) const {
        return layout.template view<T>(a, row, unit);
    }
    V exponent(V logit, const Statistics<L>& statistics, int k) const {
        return (logit - statistics.top[k]) * rate;
    }
    V coefficient(int64_t row) const {
        return broadcast<V>(
            static_cast<const S*>(mixing_coefficient.data)[row * mixing_coefficient.stride[0]]);
    }

    // Computed in a first pass over a unit of the student's or the teacher's logits, and saved.
    Softmax<L> softmax(const Array& a, int64_t row, int64_t unit, V* exponential, V* exponents = nullptr) const {
        const auto x = logits(a, row, unit);
        V tops[L::width];
        for (V& top : tops) top = broadcast<V>(excluded);
        layout.each(unit, [&](auto at) {
            const V logit = x.read(at, excluded);
            exponential[at.index()] = logit;
            tops[at.k] = max(tops[at.k], logit);
        });
        Softmax<L> result{{L::reduce(tops, [](auto a, auto b) { return max(a, b); }), {}}, exponential, exponents, {}};
        result.sum = layout.sum(unit, [&](auto at) {
            const V z = exponent(exponential[at.index()], result, at.k);
            if (exponents) exponents[at.index()] = z;
            return exponential[at.index()] = exp2(z);
        });
        for (int k = 0; k < L::width; ++k) result.inverse_sum[k] = 1 / result.sum[k];
        layout.save(saved, first_statistic(a), row, unit, result.top);
        layout.save(saved, first_statistic(a) + 1, row, unit, result.inverse_sum);
        return result;
    }
    // What that pass saved.
    Statistics<L> statistics(const Array& a, int64_t row, int64_t unit) const {
        return {layout.saved(saved, first_statistic(a), row, unit),
                layout.saved(saved, first_statistic(a) + 1, row, unit)};
    }
    // Computed in a second pass.
    Softmax<L> softmax_again(const Array& a, int64_t row, int64_t unit, V* exponential,
                             V* exponents = nullptr) const {
        const auto x = logits(a, row, unit);
        Softmax<L> result{statistics(a, row, unit), exponential, exponents, {}};
        layout.each(unit, [&](auto at) {
            const V z = exponent(x.read(at, excluded), result, at.k);
            if (exponents) exponents[at.index()] = z;
            exponential[at.index()] = exp2(z);
        });
        for (int k = 0; k < L::width; ++k) result.sum[k] = 1 / result.inverse_sum[k];
        return result;
    }

    // log2(ỹ / p), exactly 0 where student and label agree. Both may be 0. The sum joins the label, as its logarithm
    // would round all classes of a site alike, and the error would not average out.
    template <class Place>
    static V log_ratio(V label, const Softmax<L>& s, Place at) {
        const V ratio = log2(label * s.sum[at.k]) - s.exponent[at.index()];
        return label == s.probability(at) ? V{} : ratio;
    }
    // p − ỹ, exactly 0 where both agree, which a multiply-add with the product in p would miss.
    static V difference(V p, V label) { return p == label ? V{} : p - label; }

    // Calls work(pair, unit, its thread's memory, task) for every unit of every pair. A task is a run of units.
    template <class Work>
    void for_each_unit(int64_t pairs, int threads, int64_t memory_slots, Work&& work) const {
        const int64_t total = pairs * layout.units;
        const auto memory = [&] { return Buffer<V>(memory_slots * layout.size()); };
        parallel_for(tasks(pairs), total * layout.size() * lanes<V>, threads, memory,
                     [&](int64_t task, Buffer<V>& slots) {
                         const int64_t end = (task + 1) * task_units() < total ? (task + 1) * task_units() : total;
                         for (int64_t i = task * task_units(); i < end; ++i)
                             work(i / layout.units, i % layout.units, slots.data(), task);
                         finish_streaming();
                     });
    }
    int64_t tasks(int64_t pairs) const {
        return layout.size() ? (pairs * layout.units + task_units() - 1) / task_units() : 0;
    }

private:
    // The student's are numbers 0 and 1, the teacher's 2 and 3.
    int first_statistic(const Array& a) const { return &a == &teacher ? 2 : 0; }

    int64_t task_units() const {
        constexpr int64_t task_elements = 1 << 16;  // of neighbours that share a page, two threads would fault on it
        const int64_t units = task_elements / (layout.size() * lanes<V>);
        return units > 1 ? units : 1;
    }
};

// Calls f(problem) for the logits' dtype and layout.
template <class F>
void with_problem(const Array& student, const Array& teacher, const Array& mixing_coefficient,
                  double temperature, const Array& saved, F&& f) {
    with_storage(student.dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const auto call = [&](auto layout) {
            f(InterpolatedKlDiv<decltype(layout), T>{layout, student, teacher, mixing_coefficient, saved,
                                                     broadcast<vector_t<T>>(1 / (ln2 * temperature))});
        };
        if (student.stride[1] != 1) call(Layout<T, false>(student));
        else if (student.shape[1] > 4 * lanes<vector_t<T>>) call(Layout<T, true>(student));
        else call(Layout<T, true, 1>(student));  // the loop would cost more than so few vectors
    });
}

// loss = scale · T² Σ ỹ log(ỹ / p), or the scaled terms themselves where loss is not a scalar.
void interpolated_kl_div_forward(Array loss, Array student, Array teacher, Array mixing_coefficient,
                                 Indices partner, double temperature, double scale, Array saved,
                                 int threads) {
    const std::vector<Pair> pairs = pair_rows(partner, student.shape[0]);
    const auto pair_count = static_cast<int64_t>(pairs.size());
    const double factor = scale * temperature * temperature * ln2;
    with_problem(student, teacher, mixing_coefficient, temperature, saved, [&](const auto& problem) {
        using Problem = std::decay_t<decltype(problem)>;
        using V = typename Problem::V;
        using L = typename Problem::Row;
        const L& layout = problem.layout;
        const int64_t tasks = problem.tasks(pair_count);
        Buffer<double> partial(tasks);
        for (int64_t task = 0; task < tasks; ++task) partial[task] = 0;
        problem.for_each_unit(pair_count, threads, 4, [&](int64_t i, int64_t unit, V* memory, int64_t task) {
            const Pair pair = pairs[i];
            const bool alone = pair.partner == pair.row;
            const auto slot = [&](int number) { return memory + number * layout.size(); };
            const auto own = problem.softmax(problem.teacher, pair.row, unit, slot(0));
            const auto other = alone ? own : problem.softmax(problem.teacher, pair.partner, unit, slot(1));
            const auto add = [&](int64_t row, const auto& first, const auto& second) {
                const auto s = problem.softmax(problem.student, row, unit, slot(2), slot(3));
                const Label<L> label(first, second, problem.coefficient(row));
                const auto term = [&](auto at) {
                    const V y = label(first.exponential[at.index()], second.exponential[at.index()], at.k);
                    return y * problem.log_ratio(y, s, at);
                };
                if (loss.dimensions > 0) {
                    const auto out = layout.template view<typename Problem::S>(loss, row, unit);
                    layout.each(unit, [&](auto at) { out.write(at, broadcast<V>(factor) * term(at)); });
                } else {
                    partial[task] += layout.over_sites(layout.sum(unit, term), unit);
                }
            };
            add(pair.row, own, other);
            if (pair.closed && !alone) add(pair.partner, other, own);
        });
        if (loss.dimensions > 0) return;
        double total = 0;
        for (int64_t task = 0; task < tasks; ++task) total += partial[task];
        write_scalar(loss, factor * total);
    });
}

// The student's gradient alone, for a scalar loss_gradient g: g · scale · T (p − ỹ). One pass, nothing saved.
template <class Problem>
void student_backward(const Problem& problem, const std::vector<Pair>& pairs, const Array& gradient,
                      double scale, int threads) {
    using V = typename Problem::V;
    using L = typename Problem::Row;
    const V factor = broadcast<V>(scale);
    const auto pair_count = static_cast<int64_t>(pairs.size());
    problem.for_each_unit(pair_count, threads, 0, [&](int64_t i, int64_t unit, V*, int64_t) {
        const auto [row, partner, inverse, closed] = pairs[i];
        const auto own = problem.statistics(problem.teacher, row, unit);
        const auto other = problem.statistics(problem.teacher, partner, unit);
        const auto t = problem.logits(problem.teacher, row, unit);
        const auto u = problem.logits(problem.teacher, partner, unit);
        const auto exponential = [&](const auto& x, const Statistics<L>& statistics, auto at) {
            return exp2(problem.exponent(x.read(at, Problem::excluded), statistics, at.k));
        };
        const auto differentiate = [&](int64_t row, const auto& first, const auto& second) {
            return [&, statistics = problem.statistics(problem.student, row, unit),
                    s = problem.logits(problem.student, row, unit), ds = problem.logits(gradient, row, unit),
                    label = Label<L>(first, second, problem.coefficient(row))](auto at, V e, V e_other) {
                const V p = exponential(s, statistics, at) * statistics.inverse_sum[at.k];
                ds.write(at, factor * problem.difference(p, label(e, e_other, at.k)));
            };
        };
        const auto write_own = differentiate(row, own, other);
        if (closed && row != partner) {
            const auto write_other = differentiate(partner, other, own);
            problem.layout.each(unit, [&](auto at) {
                const V e = exponential(t, own, at), e_other = exponential(u, other, at);
                write_own(at, e, e_other);
                write_other(at, e_other, e);
            });
        } else {
            problem.layout.each(
                unit, [&](auto at) { write_own(at, exponential(t, own, at), exponential(u, other, at)); });
        }
    });
}

// The gradients that exist, for loss_gradient g, a scalar or of the logits' shape:
//   student: T (p Σ g ỹ − g ỹ)
//   teacher: T Σ w q (h − Σ q h), h = g (log(ỹ / p) + 1), over the two labels that a teacher's row is mixed into, with
//            its weight w = λ in its own, 1 − λ in the other.
template <class Problem>
void full_backward(const Problem& problem, const std::vector<Pair>& pairs, const Array& student_gradient,
                   const Array& teacher_gradient, const Array& loss_gradient, double scale, int threads) {
    using V = typename Problem::V;
    using L = typename Problem::Row;
    using S = typename Problem::S;
    const L& layout = problem.layout;
    const bool elementwise = loss_gradient.dimensions > 0;
    const V factor = broadcast<V>(scale);
    const auto pair_count = static_cast<int64_t>(pairs.size());
    problem.for_each_unit(pair_count, threads, 9, [&](int64_t i, int64_t unit, V* memory, int64_t) {
        const Pair pair = pairs[i];
        const bool alone = pair.partner == pair.row;
        const auto slot = [&](int number) { return memory + number * layout.size(); };

        // writes the gradient of a label's student, and leaves h in `label_gradient`
        const auto differentiate = [&](int64_t row, const auto& first, const auto& second, V* label_gradient,
                                       bool write) {
            const auto s = problem.softmax_again(problem.student, row, unit, slot(2), slot(3));
            const auto upstream = layout.template view<S>(loss_gradient, row, unit);
            const Label<L> mix(first, second, problem.coefficient(row));
            const auto label = [&](auto at) {
                return mix(first.exponential[at.index()], second.exponential[at.index()], at.k);
            };
            if (teacher_gradient.exists())
                layout.each(unit, [&](auto at) {
                    const V ratio = broadcast<V>(ln2) * problem.log_ratio(label(at), s, at);
                    label_gradient[at.index()] = elementwise ? upstream.read(at, 0) * (ratio + 1) : ratio;
                });
            if (!write || !student_gradient.exists()) return;
            const auto ds = problem.logits(student_gradient, row, unit);
            if (!elementwise) {
                layout.each(unit, [&](auto at) {
                    ds.write(at, factor * problem.difference(s.probability(at), label(at)));
                });
                return;
            }
            const auto weigh = [&](auto at) {
                const V y = label(at);
                return y == 0 ? V{} : upstream.read(at, 0) * y;
            };
            const auto total = layout.sum(unit, weigh);
            layout.each(unit, [&](auto at) {
                ds.write(at, factor * (s.probability(at) * total[at.k] - weigh(at)));
            });
        };
        // q · value, where 0 · ∞ is 0
        const auto weigh = [](const auto& q, auto at, V value) {
            const V p = q.probability(at);
            return p == 0 ? V{} : p * value;
        };
        // q (h − Σ q h)
        const auto pull = [&](const auto& q, const V* h, V* pulled) {
            const auto mean = layout.sum(unit, [&](auto at) { return weigh(q, at, h[at.index()]); });
            // corrects the rounding error of Σ q in the mean
            const auto rest =
                layout.sum(unit, [&](auto at) { return weigh(q, at, h[at.index()] - mean[at.k]); });
            layout.each(unit, [&](auto at) {
                pulled[at.index()] = weigh(q, at, h[at.index()] - mean[at.k] - rest[at.k]);
            });
        };
        // through the two labels with gradients h to the row with probabilities q
        const auto write_teacher = [&](int64_t row, const auto& q, const V* h, int64_t other_row,
                                       const V* other_h) {
            const V weight = problem.coefficient(row), other_weight = 1 - problem.coefficient(other_row);
            pull(q, h, slot(7));
            pull(q, other_h, slot(8));
            const auto dt = problem.logits(teacher_gradient, row, unit);
            layout.each(unit, [&](auto at) {
                dt.write(at, factor * (weight * slot(7)[at.index()] + other_weight * slot(8)[at.index()]));
            });
        };

        const auto own = problem.softmax_again(problem.teacher, pair.row, unit, slot(0));
        const auto other = alone ? own : problem.softmax_again(problem.teacher, pair.partner, unit, slot(1));
        differentiate(pair.row, own, other, slot(4), true);
        if (alone) {
            if (teacher_gradient.exists()) write_teacher(pair.row, own, slot(4), pair.row, slot(4));
        } else if (pair.closed) {
            differentiate(pair.partner, other, own, slot(5), true);
            if (!teacher_gradient.exists()) return;
            write_teacher(pair.row, own, slot(4), pair.partner, slot(5));
            write_teacher(pair.partner, other, slot(5), pair.row, slot(4));
        } else if (teacher_gradient.exists()) {
            const auto inverse = problem.softmax_again(problem.teacher, pair.inverse, unit, slot(6));
            differentiate(pair.inverse, inverse, own, slot(5), false);
            write_teacher(pair.row, own, slot(4), pair.inverse, slot(5));
        }
    });
}

void interpolated_kl_div_backward(Array student_gradient, Array teacher_gradient, Array loss_gradient,
                                  Array student, Array teacher, Array mixing_coefficient, Indices partner,
                                  double temperature, double scale, Array saved, int threads) {
    const std::vector<Pair> pairs = pair_rows(partner, student.shape[0]);
    const bool elementwise = loss_gradient.dimensions > 0;
    scale *= temperature * (elementwise ? 1 : read_scalar(loss_gradient));
    with_problem(student, teacher, mixing_coefficient, temperature, saved, [&](const auto& problem) {
        if (elementwise || teacher_gradient.exists())
            full_backward(problem, pairs, student_gradient, teacher_gradient, loss_gradient, scale, threads);
        else student_backward(problem, pairs, student_gradient, scale, threads);
    });
}

}  // namespace dfad::DFAD_ISA
