// Stands in for PyTorch's: plain threads, of which the first may be late.

#pragma once

#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline uint32_t num_threads = 1;
inline bool first_is_late = false;  // it begins when the others have ended

inline uint32_t get_num_threads() { return num_threads; }

template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t, const Work& work) {
  std::vector<std::thread> others;
  for (int64_t i = begin + 1; i < end; ++i) others.emplace_back([&work, i] { work(i, i + 1); });
  if (begin < end && !first_is_late) work(begin, begin + 1);
  for (std::thread& other : others) other.join();
  if (begin < end && first_is_late) work(begin, begin + 1);
}

}  // namespace torch::stable
