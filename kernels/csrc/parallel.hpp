#pragma once

#include <cstdint>

namespace dfad::DFAD_ISA {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t elements_per_thread = 1 << 15;

// Calls f(block, memory) for blocks 0 to blocks - 1, with what make_memory() gives each thread. Which thread runs a
// block is left to chance, so a block must not depend on it.
template <class Make, class F>
inline void parallel_for(int64_t blocks, int64_t elements, int threads, Make&& make_memory, F&& f) {
    const int64_t useful = elements / elements_per_thread + 1;
    const int team = static_cast<int>(useful < threads ? useful : threads);
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

}  // namespace dfad::DFAD_ISA
