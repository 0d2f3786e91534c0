// topd::bf16_addmm on the CPU: out = beta out + alpha (a factors) b, summed in float32, b in bfloat16 and a in either, by
// torch's brgemm (oneDNN's kernel for one block: AVX512_BF16 or AMX). torch.mm has no such product on a CPU. An out in bfloat16
// is rounded once, block by block: no float32 sums of its size are written.
//
// A float32 a is split into two bfloat16 parts as it is packed, x = hi + lo with |x - hi - lo| <= 2^-18 |x|, and multiplied as
// both: a b = hi b + lo b. The blocks and the order of every sum depend on the shapes alone, not on the threads.

#include "../ops.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <ATen/cpu/vec/functional.h>

#include <memory>

#include "bf16_packing.h"

namespace topd {
inline namespace CPU_CAPABILITY {

namespace {

// Depth of a block, in rows of b; even, since two of them are packed side by side.
constexpr int64_t kDepthInPlace = 1024, kDepthSplit = 256;
// Rows of a block: more where a is read in place, so that a packed block of b serves more of them, and fewer where the depth is
// small, so that the sums stay in the first cache.
constexpr int64_t kRowsInPlace = 512, kRowsPacked = 128, kRowsShallow = 32, kShallow = 64;
// Columns of a block: fewer where b is transposed as it is packed.
constexpr int64_t kColumns = 384, kColumnsTransposed = 64;
// Rows of out that are few.
constexpr int64_t kFewRows = 64;
// Below this many tasks the depth is shared out too, in slices that are worth a task.
constexpr int64_t kTasks = 32, kSlice = 2048;

int64_t blocks(int64_t size, int64_t most) { return (size + most - 1) / most; }
int64_t evenly(int64_t size, int64_t most) { return blocks(size, blocks(size, most)); }

// A task: a block of the product, summed over a slice of the depth.
struct Task {
  int64_t slice, row, rows, column, columns, first, last;
};

// How a product is cut into tasks.
struct Tasks {
  int64_t rows, columns, depth;       // of the whole product
  int64_t block_depth;                // of what is packed at once
  int64_t block_rows, block_columns;  // of a task
  int64_t slices, slice_depth;        // parts of the depth, each summed by tasks of its own

  Tasks(const Operand& a, const Operand& b)
      : rows(a.rows()), columns(b.columns()), depth(a.columns()), block_depth(a.wide() ? kDepthSplit : kDepthInPlace),
        block_rows(evenly(rows, a.in_place(depth)  ? kRowsInPlace
                                : depth > kShallow ? kRowsPacked
                                                   : kRowsShallow)),
        block_columns(evenly(columns, b.transposed() ? kColumnsTransposed : kColumns)) {
    const int64_t wanted = tiles() < kTasks ? std::min(kTasks / tiles(), blocks(depth, kSlice)) : 1;
    slice_depth = blocks(blocks(depth, block_depth), wanted) * block_depth;
    slices = blocks(depth, slice_depth);
  }

  int64_t down() const { return blocks(rows, block_rows); }
  int64_t tiles() const { return down() * blocks(columns, block_columns); }
  Task task(int64_t i) const {
    const int64_t slice = i / tiles(), tile = i % tiles(), first = slice * slice_depth;
    const int64_t row = tile % down() * block_rows, column = tile / down() * block_columns;
    return {slice,
            row,
            std::min(block_rows, rows - row),
            column,
            std::min(block_columns, columns - column),
            first,
            std::min(depth, first + slice_depth)};
  }
};

// Where sums go: rows `ld` apart; `add`: to what is there.
struct Target {
  float* data;
  int64_t ld;
  bool add;
};

void sum(const Task& task, int64_t block_depth, const Operand& a, const Operand& b, const float* factors, Packing& packing,
         const Target& to) {
  for (int64_t k = task.first; k < task.last; k += block_depth) {
    const int64_t depth = std::min(block_depth, task.last - k);
    const at::BFloat16* const right = packing.b(b, k, depth, task.column, task.columns, a.wide());
    const Block left = packing.a(a, task.row, task.rows, k, depth, factors ? factors + k : nullptr);
    const bool add = to.add || k > task.first;
    at::native::cpublas::brgemm(task.rows, task.columns, left.depth, left.ld, task.columns, to.ld, add, left.data, right,
                                to.data);
  }
}

// Calls body(task, packing, block) for each task; `block` has room for its sums.
template <typename Body>
void for_each_task(const Tasks& tasks, const Body& body) {
  at::parallel_for(0, tasks.tiles() * tasks.slices, 1, [&](int64_t begin, int64_t end) {
    Packing packing(tasks.block_rows, tasks.block_columns, std::min(tasks.depth, tasks.block_depth));
    const std::unique_ptr<float[]> block(new float[tasks.block_rows * tasks.block_columns]);
    for (int64_t i = begin; i < end; ++i) body(tasks.task(i), packing, block.get());
    at::native::cpublas::brgemm_release();
  });
}

// Writes each slice of the depth to an out of its own, tasks.rows * ld behind the one before.
void run(const Tasks& tasks, const Operand& a, const Operand& b, const float* factors, const Target& out) {
  for_each_task(tasks, [&](const Task& task, Packing& packing, float*) {
    float* const to = out.data + (task.slice * tasks.rows + task.row) * out.ld + task.column;
    sum(task, tasks.block_depth, a, b, factors, packing, {to, out.ld, out.add});
  });
}

void run_rounded(const Tasks& tasks, const Operand& a, const Operand& b, const float* factors, at::BFloat16* out, int64_t ld) {
  for_each_task(tasks, [&](const Task& task, Packing& packing, float* block) {
    sum(task, tasks.block_depth, a, b, factors, packing, {block, task.columns, false});
    for (int64_t i = 0; i < task.rows; ++i)
      at::vec::convert(block + i * task.columns, out + (task.row + i) * ld + task.column, task.columns);
  });
}

// out = (a b)ᵀ: where out has few rows, b's many columns are cheaper as rows that are read in place than packed for so few.
void run_turned(const Tasks& tasks, const Operand& a, const Operand& b, float* out, int64_t ld) {
  for_each_task(tasks, [&](const Task& task, Packing& packing, float* block) {
    sum(task, tasks.block_depth, a, b, nullptr, packing, {block, task.columns, false});
    at::vec::transpose_mxn<float>(block, task.columns, out + task.column * ld + task.row, ld, task.rows, task.columns);
  });
}

}  // namespace

void bf16_addmm(at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& factors,
                double beta, double alpha) {
  const bool rounds = out.scalar_type() == at::kBFloat16;
  TORCH_CHECK_VALUE(out.dim() == 2 && (out.stride(1) == 1 || out.size(1) <= 1), "out must be [M, N], contiguous along N");
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat || (rounds && beta == 0.0), "out must be float32, or bfloat16 with beta 0");
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
  if (left.wide()) scaled = factors ? factors->mul(alpha) : at::full({a.size(1)}, alpha, out.options().dtype(at::kFloat));
  const float* const factor = left.wide() ? scaled.const_data_ptr<float>() : nullptr;
  if (!rounds && beta == 0.0 && a.size(0) <= kFewRows && !left.wide()) {
    const Operand turned_left("b", b.t()), turned_right("a", a.t());
    const Tasks tasks(turned_left, turned_right);
    if (turned_left.in_place(a.size(1)) && tasks.slices == 1)
      return run_turned(tasks, turned_left, turned_right, out.data_ptr<float>(), out.stride(0));
  }
  const Tasks tasks(left, right);
  if (tasks.slices == 1 && rounds) return run_rounded(tasks, left, right, factor, out.data_ptr<at::BFloat16>(), out.stride(0));
  if (tasks.slices == 1) return run(tasks, left, right, factor, {out.data_ptr<float>(), out.stride(0), beta != 0.0});
  const at::Tensor parts = at::empty({tasks.slices, tasks.rows, tasks.columns}, out.options().dtype(at::kFloat));
  run(tasks, left, right, factor, {parts.data_ptr<float>(), tasks.columns, false});
  const at::Tensor total = parts[0];
  for (int64_t slice = 1; slice < tasks.slices; ++slice) total.add_(parts[slice]);
  if (beta == 0.0) out.copy_(total);
  else out.add_(total);
}

}  // namespace CPU_CAPABILITY
}  // namespace topd
