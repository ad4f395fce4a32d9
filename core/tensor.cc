#include "core/tensor.h"

namespace sala {

int64_t NumElements(std::initializer_list<int64_t> shape) {
  int64_t n = 1;
  for (int64_t d : shape) n *= d;
  return n;
}

std::string ShapeText(const ConstTensor& tensor) {
  std::string text = "[";
  for (int d = 0; d < tensor.rank(); ++d) {
    if (d > 0) text += ", ";
    text += std::to_string(tensor.dim(d));
  }
  return text + "] " + std::string(NameOf(tensor.dtype()));
}

}  // namespace sala
