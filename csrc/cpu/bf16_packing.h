// Blocks of bf16_addmm's operands as brgemm reads them: a by rows, b with two rows side by side, [K/2][N][2]; both with an even
// depth, filled up by a zero. A float32 a is split into hi + lo, side by side in one row of twice the depth, [hi | lo], and b
// stands twice, [b; b], so that one product sums both.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <memory>

namespace topd {
inline namespace CPU_CAPABILITY {

// One operand, [rows, columns], bfloat16 or float32, contiguous along one of both.
class Operand {
 public:
  Operand(const char* name, const at::Tensor& tensor)
      : wide_(tensor.scalar_type() == at::kFloat), data_(tensor.const_data_ptr()) {
    TORCH_CHECK_VALUE(tensor.dim() == 2 && (wide_ || tensor.scalar_type() == at::kBFloat16), name,
                      " must be bfloat16 or float32 with two dimensions, got ", tensor.scalar_type(), " ", tensor.sizes());
    rows_ = tensor.size(0), columns_ = tensor.size(1);
    transposed_ = tensor.stride(1) != 1 && columns_ > 1;
    ld_ = transposed_ ? tensor.stride(1) : rows_ > 1 ? tensor.stride(0) : columns_;
    TORCH_CHECK_VALUE(!transposed_ || tensor.stride(0) == 1 || rows_ <= 1, name, " must be contiguous along one dimension");
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  bool wide() const { return wide_; }
  bool transposed() const { return transposed_; }
  // Elements from one row, or column where transposed, to the next.
  int64_t ld() const { return ld_; }
  // Whether brgemm can read `depth` columns of it as they are.
  bool in_place(int64_t depth) const { return !wide_ && !transposed_ && depth % 2 == 0; }
  template <typename T>
  const T* pointer(int64_t row, int64_t column) const {
    return static_cast<const T*>(data_) + (transposed_ ? column * ld_ + row : row * ld_ + column);
  }

 private:
  bool wide_, transposed_;
  const void* data_;
  int64_t rows_, columns_, ld_;
};

// A block of a as brgemm takes it: `ld` elements from one row to the next, `depth` columns.
struct Block {
  const at::BFloat16* data;
  int64_t ld, depth;
};

// Rounds to nearest, ties to even; infinities stay, NaNs stay NaNs.
inline uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}

inline float widened(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// Splits n products from[i] * factors[i] into hi and lo. What is not finite has no lo.
inline void split(const float* from, const float* factors, int64_t n, uint16_t* __restrict hi, uint16_t* __restrict lo) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = from[i] * factors[i];
    const uint16_t high = rounded(x), rest = rounded(x - widened(high));
    hi[i] = high;
    lo[i] = (high & 0x7f80) == 0x7f80 ? 0 : rest;
  }
}

// The blocks of one thread, packed into buffers that it uses again.
class Packing {
 public:
  // For blocks of at most rows x depth and depth x columns.
  Packing(int64_t rows, int64_t columns, int64_t depth)
      : a_(new uint16_t[rows * 2 * (depth + 1)]), b_(new uint16_t[columns * 2 * (depth + 1)]) {}

  // Packs a block of a; factors[0 .. depth) multiply the columns of a float32 block.
  Block a(const Operand& from, int64_t row, int64_t rows, int64_t column, int64_t depth, const float* factors) {
    if (from.in_place(depth)) return {from.pointer<at::BFloat16>(row, column), from.ld(), depth};
    const int64_t even = depth + depth % 2, ld = from.wide() ? 2 * even : even;
    if (from.wide() && from.transposed()) {
      split_transposed(from, row, rows, column, depth, factors);
    } else {
      for (int64_t i = 0; i < rows; ++i) {
        uint16_t* const to = a_.get() + i * ld;
        if (from.wide()) split(from.pointer<float>(row + i, column), factors, depth, to, to + even);
        else std::memcpy(to, from.pointer<uint16_t>(row + i, column), sizeof(uint16_t) * depth);
      }
    }
    for (int64_t i = 0; i < (even != depth ? rows : 0); ++i) a_[i * ld + depth] = a_[i * ld + ld - 1] = 0;
    return {reinterpret_cast<const at::BFloat16*>(a_.get()), ld, ld};
  }

  // Packs a block of b, unless it is the one packed last.
  const at::BFloat16* b(const Operand& from, int64_t row, int64_t depth, int64_t column, int64_t columns, bool twice) {
    const bool packed_last = row == last_row_ && column == last_column_;
    last_row_ = row, last_column_ = column;
    if (packed_last) return reinterpret_cast<const at::BFloat16*>(b_.get());
    if (from.transposed()) {
      transpose(from, row, depth, column, columns);
    } else {
      for (int64_t k = 0; k < depth; k += 2)
        interleave(from.pointer<uint16_t>(row + k, column),
                   k + 1 < depth ? from.pointer<uint16_t>(row + k + 1, column) : nullptr, columns, b_.get() + k * columns);
    }
    const int64_t packed = (depth + depth % 2) * columns;
    if (twice) std::memcpy(b_.get() + packed, b_.get(), sizeof(uint16_t) * packed);
    return reinterpret_cast<const at::BFloat16*>(b_.get());
  }

 private:
  // Writes two rows of b side by side; zeros where there is no second one.
  static void interleave(const uint16_t* even, const uint16_t* odd, int64_t n, uint16_t* __restrict to) {
    for (int64_t j = 0; j < n; ++j) {
      to[2 * j] = even[j];
      to[2 * j + 1] = odd ? odd[j] : 0;
    }
  }

  void split_transposed(const Operand& from, int64_t row, int64_t rows, int64_t column, int64_t depth, const float* factors) {
    constexpr int64_t kSide = 16;
    const int64_t even = depth + depth % 2;
    float piece[kSide * kSide];
    for (int64_t k = 0; k < depth; k += kSide) {
      for (int64_t i = 0; i < rows; i += kSide) {
        const int64_t down = std::min(kSide, depth - k), across = std::min(kSide, rows - i);
        at::vec::transpose_mxn<float>(from.pointer<float>(row + i, column + k), from.ld(), piece, kSide, down, across);
        for (int64_t j = 0; j < across; ++j) {
          uint16_t *const hi = a_.get() + (i + j) * 2 * even + k, *const lo = hi + even;
          if (down == kSide) split(piece + kSide * j, factors + k, kSide, hi, lo);  // a constant count: one register
          else split(piece + kSide * j, factors + k, down, hi, lo);
        }
      }
    }
  }

  // Along K pairs stand side by side already: where each row begins on a whole word, words are transposed.
  void transpose(const Operand& from, int64_t row, int64_t depth, int64_t column, int64_t columns) {
    const int64_t words = from.ld() % 2 == 0 ? depth / 2 : 0;
    if (words)
      at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from.pointer<uint16_t>(row, column)), from.ld() / 2,
                                    reinterpret_cast<float*>(b_.get()), columns, columns, words);
    for (int64_t k = 2 * words; k < depth + depth % 2; ++k)
      for (int64_t j = 0; j < columns; ++j)
        b_[k / 2 * 2 * columns + 2 * j + k % 2] = k < depth ? *from.pointer<uint16_t>(row + k, column + j) : 0;
  }

  std::unique_ptr<uint16_t[]> a_, b_;
  int64_t last_row_ = -1, last_column_ = -1;
};

}  // namespace CPU_CAPABILITY
}  // namespace topd
