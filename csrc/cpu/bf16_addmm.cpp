// topd::bf16_addmm on the CPU: out = beta out + alpha (a factors) b with out in float32, b in bfloat16 and a in either, by torch's
// brgemm (oneDNN's kernel for one block: AVX512_BF16 or AMX). torch.mm has no such product on a CPU.
//
// A float32 a is split into two bfloat16 parts as it is packed, x = hi + lo with |x - hi - lo| <= 2^-18 |x|, and multiplied as
// both: a b = hi b + lo b. The blocks and the order of every sum depend on the shapes alone, not on the threads.

#include "../ops.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include "../bf16_packing.h"

namespace topd {
inline namespace CPU_CAPABILITY {

namespace {

// Depth of a block, in rows of b; even, since two of them are packed side by side.
constexpr int64_t kDepth = 512;
// Rows of a block: more where a is read in place, so that a packed block of b serves more of them.
constexpr int64_t kRowsInPlace = 512, kRowsPacked = 128;
// Columns of a block: fewer where b is transposed as it is packed.
constexpr int64_t kColumns = 256, kColumnsTransposed = 64;
// Below this many tasks the depth is shared out too.
constexpr int64_t kTasks = 32;

int64_t blocks(int64_t size, int64_t most) { return (size + most - 1) / most; }
int64_t evenly(int64_t size, int64_t most) { return blocks(size, blocks(size, most)); }

// How a product is cut into tasks.
struct Tasks {
  int64_t rows, columns, depth;        // of the whole product
  int64_t block_rows, block_columns;   // of a task
  int64_t slices, slice_depth;         // parts of the depth, each summed by tasks of its own

  Tasks(const Operand& a, const Operand& b)
      : rows(a.rows()), columns(b.columns()), depth(a.columns()),
        block_rows(evenly(rows, a.in_place(depth) ? kRowsInPlace : kRowsPacked)),
        block_columns(evenly(columns, b.transposed() ? kColumnsTransposed : kColumns)) {
    const int64_t tiles = across() * down();
    const int64_t wanted = tiles < kTasks ? std::min(kTasks / tiles, blocks(depth, 4 * kDepth)) : 1;
    slice_depth = blocks(blocks(depth, kDepth), wanted) * kDepth;
    slices = blocks(depth, slice_depth);
  }

  int64_t across() const { return blocks(columns, block_columns); }
  int64_t down() const { return blocks(rows, block_rows); }
};

void multiply(const Rows& a, const at::BFloat16* b, int64_t rows, int64_t columns, int64_t depth, float* out, int64_t ld, bool add) {
  at::native::cpublas::brgemm(rows, columns, depth, a.ld, columns, ld, add, a.hi, b, out);
  if (a.lo) at::native::cpublas::brgemm(rows, columns, depth, a.ld, columns, ld, true, a.lo, b, out);
}

// Sums each task into out [slices, rows, columns], whose rows are ld apart; `add`: to what is there.
void run(const Tasks& tasks, const Operand& a, const Operand& b, const float* factors, float* out, int64_t ld, bool add) {
  const int64_t tiles = tasks.across() * tasks.down();
  at::parallel_for(0, tiles * tasks.slices, 1, [&](int64_t begin, int64_t end) {
    Packing packing(tasks.block_rows, tasks.block_columns, std::min(tasks.depth, kDepth));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slice = task / tiles, tile = task % tiles;
      const int64_t column = tile / tasks.down() * tasks.block_columns, row = tile % tasks.down() * tasks.block_rows;
      const int64_t rows = std::min(tasks.block_rows, tasks.rows - row);
      const int64_t columns = std::min(tasks.block_columns, tasks.columns - column);
      const int64_t first = slice * tasks.slice_depth, last = std::min(tasks.depth, first + tasks.slice_depth);
      float* const to = out + (slice * tasks.rows + row) * ld + column;
      for (int64_t k = first; k < last; k += kDepth) {
        const int64_t depth = std::min(kDepth, last - k);
        const at::BFloat16* const block = packing.b(b, k, depth, column, columns);
        const Rows left = packing.a(a, row, rows, k, depth, factors ? factors + k : nullptr);
        multiply(left, block, rows, columns, depth + depth % 2, to, ld, add || k > first);
      }
    }
    at::native::cpublas::brgemm_release();
  });
}

}  // namespace

void bf16_addmm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& factors, double beta,
                double alpha) {
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat && out.dim() == 2 && (out.stride(1) == 1 || out.size(1) <= 1),
                    "out must be float32 [M, N], contiguous along N");
  const Operand left("a", a), right("b", b);
  TORCH_CHECK_VALUE(left.wide() || (!left.transposed() && !factors && alpha == 1.0),
                    "a in bfloat16 must be contiguous along K, without factors and alpha");
  TORCH_CHECK_VALUE(!right.wide(), "b must be bfloat16, got ", b.scalar_type());
  TORCH_CHECK_VALUE(left.columns() == right.rows() && out.size(0) == left.rows() && out.size(1) == right.columns(),
                    "out, a and b must be [M, N], [M, K] and [K, N], got ", out.sizes(), ", ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(!factors || (factors->scalar_type() == at::kFloat && factors->dim() == 1 && factors->numel() == a.size(1)),
                    "factors must be float32 [K]");
  if (beta == 0.0) {
    if (a.size(1) == 0) out.zero_();
  } else if (beta != 1.0) {
    out.mul_(beta);
  }
  if (out.numel() == 0 || a.size(1) == 0) return;
  at::Tensor scaled;
  if (left.wide()) scaled = factors ? factors->mul(alpha) : at::full({a.size(1)}, alpha, out.options());
  const float* const factor = left.wide() ? scaled.const_data_ptr<float>() : nullptr;
  const Tasks tasks(left, right);
  if (tasks.slices == 1) return run(tasks, left, right, factor, out.data_ptr<float>(), out.stride(0), beta != 0.0);
  const at::Tensor parts = at::empty({tasks.slices, tasks.rows, tasks.columns}, out.options());
  run(tasks, left, right, factor, parts.data_ptr<float>(), tasks.columns, false);
  for (int64_t slice = 0; slice < tasks.slices; ++slice) {
    if (slice == 0 && beta == 0.0) out.copy_(parts[slice]);
    else out.add_(parts[slice]);
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
