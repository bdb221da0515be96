// A peer of the control socket: any bytes, in any pieces. Every line is understood or refused, what is kept
// of a peer stays small, and every answer is one line that is JSON again.
#include <cstdlib>

#include "vm/control/protocol.hpp"

namespace {

using namespace lodge::vm::control;

void check_answer(const std::string& line) {
  if (line.find('\n') != line.size() - 1 || !Received::accept(line)) std::abort();
}

void answer(const std::string& line) {
  Received id;
  try {
    const Request request = parse_request(line, id);
    for (const char* name : {"value", "device", "size", "action"}) {
      try {
        number_argument(request, name, 1 << 20);
      } catch (const CommandError& error) {
        check_answer(failure_line(error, id));
      }
    }
    allow_arguments(request, {"value"});
    check_answer(success_line(text_argument(request, "value"), id));
  } catch (const CommandError& error) {
    check_answer(failure_line(error, id));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  LineBuffer lines;
  std::string_view input(reinterpret_cast<const char*>(data), size);
  while (!input.empty()) {
    const size_t piece = std::min<size_t>(input.size(), 1 + static_cast<uint8_t>(input[0]) % 64);
    lines.append(input.substr(0, piece));
    input.remove_prefix(piece);
    while (const auto line = lines.take()) answer(*line);
    if (lines.overlong()) break;
  }
  return 0;
}
