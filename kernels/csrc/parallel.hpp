#pragma once

#include <cstdint>

namespace dfad::DFAD_ISA {

// Below this many elements a second thread costs more than it saves.
constexpr int64_t elements_per_thread = 1 << 15;

inline int team_of(int64_t elements, int threads) {
    const int64_t useful = elements / elements_per_thread + 1;
    return static_cast<int>(useful < threads ? useful : threads);
}

// Calls f(block, memory) for blocks 0 to blocks - 1, with what make_memory() gives each thread. Which thread runs a
// block is not determined, so a block must not depend on it.
template <class Make, class F>
inline void parallel_for(int64_t blocks, int64_t elements, int threads, Make&& make_memory, F&& f) {
    const int team = team_of(elements, threads);
#pragma omp parallel num_threads(team) if (team > 1)
    {
        auto memory = make_memory();
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < blocks; ++block) f(block, memory);
    }
}

template <class F>
inline void parallel_for(int64_t blocks, int64_t elements, int threads, F&& f) {
    struct Nothing {};
    parallel_for(blocks, elements, threads, [] { return Nothing{}; }, [&](int64_t block, Nothing) { f(block); });
}

enum class Order { forth, back };

// As parallel_for, but each thread has the same range of blocks in every pass, and its passes alternate in direction:
// a pass begins with what the previous one left in the thread's own caches.
template <class Make, class F>
inline void parallel_stretches(int64_t blocks, int64_t elements, int threads, Order order, Make&& make_memory, F&& f) {
    const int team = team_of(elements, threads);
#pragma omp parallel num_threads(team) if (team > 1)
    {
        auto memory = make_memory();
#pragma omp for schedule(static)
        for (int64_t stretch = 0; stretch < team; ++stretch) {
            const int64_t first = blocks * stretch / team, last = blocks * (stretch + 1) / team;
            if (order == Order::forth)
                for (int64_t block = first; block < last; ++block) f(block, memory);
            else
                for (int64_t block = last; block-- > first;) f(block, memory);
        }
    }
}

template <class F>
inline void parallel_stretches(int64_t blocks, int64_t elements, int threads, Order order, F&& f) {
    struct Nothing {};
    parallel_stretches(
        blocks, elements, threads, order, [] { return Nothing{}; }, [&](int64_t block, Nothing) { f(block); });
}

}  // namespace dfad::DFAD_ISA
