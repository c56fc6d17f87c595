#pragma once

#include <cstdint>

namespace dfad::DFAD_ISA {

// Below this many elements a second thread costs more than it brings.
constexpr int64_t elements_per_thread = 1 << 15;

// Calls f(0) … f(blocks - 1). Which thread runs a block is left to chance, so a block must not depend on it.
template <class F>
inline void parallel_for(int64_t blocks, int64_t elements, int threads, F&& f) {
    const int64_t useful = elements / elements_per_thread + 1;
    const int team = static_cast<int>(useful < threads ? useful : threads);
#pragma omp parallel for num_threads(team) schedule(dynamic) if (team > 1)
    for (int64_t block = 0; block < blocks; ++block) f(block);
}

}  // namespace dfad::DFAD_ISA
