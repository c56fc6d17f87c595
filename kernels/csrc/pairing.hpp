#pragma once

#include <cstdint>
#include <vector>

#include "array.hpp"

namespace dfad {

// A row and the rows that share work with it: the partner whose soft label it is mixed with, and the row that has it
// as partner. Where the two are the same row, the pair is closed: both rows are done at once, so each is read
// once.
struct Pair {
    int64_t row, partner, inverse;
    bool closed;
};

// Rows are paired with the reversed batch where `partner` is empty.
// Throws std::invalid_argument unless `partner` is a permutation.
std::vector<Pair> pair_rows(Indices partner, int64_t rows);

}  // namespace dfad
