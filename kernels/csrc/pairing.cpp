#include "pairing.hpp"

#include <stdexcept>
#include <string>

namespace dfad {

std::vector<Pair> pair_rows(Indices partner, int64_t rows) {
    std::vector<int64_t> inverse(rows, -1);
    const auto partner_of = [&](int64_t row) { return partner.data ? partner.data[row] : rows - 1 - row; };
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t other = partner_of(row);
        const std::string given = "partner[" + std::to_string(row) + "] is " + std::to_string(other);
        if (other < 0 || other >= rows)
            throw std::invalid_argument(given + "; it must be the index of one of the " +
                                        std::to_string(rows) + " samples, 0 to " + std::to_string(rows - 1) +
                                        ".");
        if (inverse[other] >= 0)
            throw std::invalid_argument(given + ", and so is partner[" + std::to_string(inverse[other]) +
                                        "]; partner must be a permutation, such as torch.randperm gives.");
        inverse[other] = row;
    }
    std::vector<Pair> pairs;
    pairs.reserve(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const Pair pair{row, partner_of(row), inverse[row], partner_of(row) == inverse[row]};
        if (!pair.closed || row <= pair.partner) pairs.push_back(pair);
    }
    return pairs;
}

}  // namespace dfad
