// Checksums and hashes of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace sala {

// CRC32C (Castagnoli, initial and final XOR all ones); "123456789" gives e3069283. `crc` continues
// an earlier value.
uint32_t Crc32c(const void* data, size_t bytes, uint32_t crc = 0);
uint64_t Xxh3(std::string_view bytes);  // XXH3-64, seed 0
std::string Sha256Hex(std::string_view bytes);
std::string Hex32(uint32_t value);  // 8 lower-case hex digits

// Streaming SHA-256 for files.
class Sha256 {
 public:
  Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;
  ~Sha256();
  void Update(const void* data, size_t bytes);
  std::string HexDigest();  // ends the stream

 private:
  void* context_;
};

}  // namespace sala
