// Dependent loads: one random cycle through nodes of a cache line each, 1 MiB in all, so that every load
// waits for the one before it and most pages are not the last one's.
#include <array>
#include <numeric>
#include <utility>

#include "program.hpp"

namespace {

struct alignas(64) Node {
  Node* next;
  uint64_t value;
};
constexpr size_t count = (1 << 20) / sizeof(Node);
std::array<Node, count> nodes;

// Sattolo's shuffle gives a permutation that is one cycle.
void link() {
  std::array<uint32_t, count> order;
  std::iota(order.begin(), order.end(), 0);
  compare::Random random;
  for (size_t i = count - 1; i > 0; i--) std::swap(order[i], order[random.below(i)]);
  for (size_t i = 0; i < count; i++) nodes[i] = {&nodes[order[i]], random.next()};
}

}  // namespace

int main(int argc, char** argv) {
  link();
  return compare::measure("loads", argc, argv, [](uint64_t iterations) {
    const Node* node = nodes.data();
    uint64_t sum = 0;
    while (iterations--) {
      for (size_t i = 0; i < count; i++) {
        sum = sum * 3 + node->value;
        node = node->next;
      }
      if (node != nodes.data()) std::abort();
    }
    return sum;
  });
}
