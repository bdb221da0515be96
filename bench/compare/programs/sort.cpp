// Quicksort of random numbers (median of three, insertion sort for short runs): data-dependent branches and
// stores that follow loads, over 256 KiB.
#include <array>
#include <utility>

#include "program.hpp"

namespace {

using Number = uint32_t;

void insertion_sort(Number* first, Number* last) {
  for (Number* next = first + 1; next < last; next++) {
    const Number value = *next;
    Number* hole = next;
    for (; hole > first && hole[-1] > value; hole--) *hole = hole[-1];
    *hole = value;
  }
}

void quicksort(Number* first, Number* last) {
  constexpr ptrdiff_t short_run = 16;
  while (last - first > short_run) {
    Number* middle = first + (last - first) / 2;
    if (*middle < *first) std::swap(*middle, *first);
    if (last[-1] < *middle) std::swap(last[-1], *middle);
    if (*middle < *first) std::swap(*middle, *first);
    const Number pivot = *middle;
    Number* left = first;
    Number* right = last - 1;
    while (left <= right) {
      while (*left < pivot) left++;
      while (pivot < *right) right--;
      if (left <= right) std::swap(*left++, *right--);
    }
    // The shorter side by recursion, so that the depth is bounded by the logarithm.
    if (right + 1 - first < last - left) {
      quicksort(first, right + 1);
      first = left;
    } else {
      quicksort(left, last);
      last = right + 1;
    }
  }
  insertion_sort(first, last);
}

std::array<Number, 65536> numbers;

}  // namespace

int main(int argc, char** argv) {
  return compare::measure("sort", argc, argv, [](uint64_t iterations) {
    compare::Random random;
    compare::Checksum sum;
    while (iterations--) {
      for (Number& number : numbers) number = static_cast<Number>(random.next() >> 32);
      quicksort(numbers.data(), numbers.data() + numbers.size());
      for (size_t i = 1; i < numbers.size(); i++)
        if (numbers[i - 1] > numbers[i]) std::abort();
      for (size_t i = 0; i < numbers.size(); i += 64) sum.add(numbers[i]);
    }
    return sum.value();
  });
}
