// How the rows of a call are handed out to threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace sftmix {

// Fewest logits that are worth another thread, or another turn of one.
constexpr int64_t kGrain = 32768;

// The next of a share's turns that nobody has taken, on a cache line of its own.
struct alignas(64) NextTurn {
  std::atomic<int64_t> index{0};
};

// Calls work(first, last) for parts of [0, num_rows) in one parallel region. Each thread has a
// share of neighbouring rows, the same in every call, so that it finds in its cache what it, or the
// matrix product before, wrote there. When done it takes rows from the others' shares: one that
// another process holds up does not keep them waiting.
template <typename Work>
void for_rows(int64_t num_rows, int64_t row_logits, const Work& work) {
  const int64_t few = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_logits));
  const int64_t turns = (num_rows + few - 1) / few;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), turns);
  std::vector<NextTurn> shares(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t share = (own + i) % threads;
      const int64_t begin = turns * share / threads, end = turns * (share + 1) / threads;
      for (int64_t turn; (turn = begin + shares[share].index.fetch_add(1)) < end;) {
        work(turn * few, std::min((turn + 1) * few, num_rows));
      }
    }
  });
}

}  // namespace sftmix
