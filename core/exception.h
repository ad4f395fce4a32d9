// What exceptions become that nobody handled nearer: errors of the catalogue (core/status.h).
#pragma once

#include <cstddef>
#include <exception>
#include <new>
#include <string>

#include "core/status.h"

namespace sala {

// The system gave no memory of the host for a block of `bytes`.
class HostMemoryError : public std::bad_alloc {
 public:
  explicit HostMemoryError(size_t bytes) : text_("asked for " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// HOST-MEMORY (71) of a std::bad_alloc, the code of a DeviceError (71), INTERNAL (70) of any other.
Status ErrorOf(const std::exception& error);

}  // namespace sala
