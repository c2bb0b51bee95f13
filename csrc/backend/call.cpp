#include "backend/call.h"

#include <iterator>

namespace mnnvl {
namespace {

template <typename T>
void append(std::vector<T>& to, std::vector<T>& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
}

// One after another; empty for none.
template <typename... Args>
std::function<void(Args...)> in_turn(std::vector<std::function<void(Args...)>> steps) {
  if (steps.empty()) return nullptr;
  if (steps.size() == 1) return std::move(steps[0]);
  return [steps = std::move(steps)](Args... args) {
    for (const auto& step : steps) step(args...);
  };
}

}  // namespace

Call merged(Call whole, std::vector<Call> parts) {
  std::vector<Body> bodies;
  std::vector<Local> epilogues;
  for (Call& part : parts) {
    append(whole.inputs, part.inputs);
    append(whole.outputs, part.outputs);
    append(whole.landing, part.landing);
    append(whole.sends, part.sends);
    append(whole.receives, part.receives);
    if (part.body) bodies.push_back(std::move(part.body));
    if (part.epilogue) epilogues.push_back(std::move(part.epilogue));
  }
  whole.body = in_turn(std::move(bodies));
  whole.epilogue = in_turn(std::move(epilogues));
  return whole;
}

}  // namespace mnnvl
