// Matrices of sixteen rows of 64 bytes, multiplied whole: Intel's AMX where the instruction set has it, and loops that
// compute the same where it has not.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.hpp"

namespace dfad::DFAD_ISA {

constexpr int tile_rows = 16;
constexpr int tile_bytes = 1024;
// Products that a multiplication sums for each result: a left factor has as many columns in bfloat16, a right one as many
// rows, of which each of the tile's holds two.
constexpr int tile_depth = 32;

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// All eight tiles of a thread, for as long as it lives.
class Tiles {
public:
    Tiles() {
        struct {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shapes;
        for (int i = 0; i < 8; ++i) {
            shapes.row_bytes[i] = 64;
            shapes.rows[i] = tile_rows;
        }
        static_assert(sizeof shapes == 64);
        asm volatile("ldtilecfg %0" ::"m"(shapes));
    }
    ~Tiles() { asm volatile("tilerelease" ::); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int tile>
    void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(tile));
    }
    // Rows that are `stride` bytes apart.
    template <int tile>
    void load(const void* p, int64_t stride) {
        asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
    }
    template <int tile>
    void store(void* p, int64_t stride) {
        asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
    }
    // sum[i, j] += Σ_k left[i, 2k] right[k, 2j] + left[i, 2k + 1] right[k, 2j + 1], the sum in float32.
    template <int sum, int left, int right>
    void multiply() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
    }
};

#else

class Tiles {
public:
    Tiles() = default;
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    template <int tile>
    void zero() {
        std::memset(tiles_[tile], 0, tile_bytes);
    }
    template <int tile>
    void load(const void* p, int64_t stride) {
        for (int row = 0; row < tile_rows; ++row)
            std::memcpy(tiles_[tile] + row * 64, static_cast<const char*>(p) + row * stride, 64);
    }
    template <int tile>
    void store(void* p, int64_t stride) {
        for (int row = 0; row < tile_rows; ++row)
            std::memcpy(static_cast<char*>(p) + row * stride, tiles_[tile] + row * 64, 64);
    }
    template <int sum, int left, int right>
    void multiply() {
        float total[16][16], l[16][32], r[16][32];
        std::memcpy(total, tiles_[sum], tile_bytes);
        widen(tiles_[left], l);
        widen(tiles_[right], r);
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 16; ++k)
                for (int j = 0; j < 16; ++j)
                    total[i][j] += l[i][2 * k] * r[k][2 * j] + l[i][2 * k + 1] * r[k][2 * j + 1];
        std::memcpy(tiles_[sum], total, tile_bytes);
    }

private:
    static void widen(const char* tile, float (&to)[16][32]) {
        for (int i = 0; i < 512; ++i) {
            uint16_t bits;
            std::memcpy(&bits, tile + 2 * i, 2);
            to[i / 32][i % 32] = bit_cast<float>(static_cast<uint32_t>(bits) << 16);
        }
    }

    alignas(64) char tiles_[8][tile_bytes];
};

#endif

}  // namespace dfad::DFAD_ISA
