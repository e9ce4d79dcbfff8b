// Checks that parallel.h hands out every row once, and that threads do not wait for a late one.
// It is for -fsanitize=thread: a row that two threads have is a race.

#include "parallel.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void check(int64_t num_rows, int64_t row_logits, int64_t threads, bool late) {
  torch::stable::num_threads = static_cast<uint32_t>(threads);
  torch::stable::first_is_late = late;
  std::vector<int> times(num_rows);
  std::vector<std::thread::id> who(num_rows);
  sftmix::for_rows(num_rows, row_logits, [&](int64_t first, int64_t last) {
    require(0 <= first && first < last && last <= num_rows, "no rows, or some that are not there");
    for (int64_t row = first; row < last; ++row) {
      ++times[row];
      who[row] = std::this_thread::get_id();
    }
  });
  for (int row_times : times) require(row_times == 1, "a row was left out or handed out twice");
  const int64_t few = std::max<int64_t>(1, sftmix::kGrain / std::max<int64_t>(1, row_logits));
  if (!late || threads == 1 || num_rows <= few) return;
  for (std::thread::id one : who) {
    require(one != std::this_thread::get_id(), "rows waited for the thread that was late");
  }
}

}  // namespace

int main() {
  for (int64_t num_rows : {0, 1, 2, 3, 7, 64, 1000}) {
    for (int64_t row_logits : {0, 1, 4096, 32768, 100000}) {
      for (int64_t threads : {1, 2, 3, 8}) {
        for (bool late : {false, true}) check(num_rows, row_logits, threads, late);
      }
    }
  }
  return 0;
}
