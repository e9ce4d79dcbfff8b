// How the rows of a call are handed out to threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace sftmix {

// Fewest logits that are worth another thread, or another turn of one.
constexpr int64_t kGrain = 32768;

// Calls work(first, last) for parts of [0, num_rows) in one parallel region. A thread takes the
// next few rows when it is done with its last: one that another process holds up does not keep the
// others waiting.
template <typename Work>
void for_rows(int64_t num_rows, int64_t row_logits, const Work& work) {
  const int64_t few = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, row_logits));
  const int64_t turns = (num_rows + few - 1) / few;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), turns);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t first; (first = next.fetch_add(few)) < num_rows;) {
      work(first, std::min(first + few, num_rows));
    }
  });
}

}  // namespace sftmix
