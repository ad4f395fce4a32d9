#include "core/hash.h"

#include <isa-l/crc.h>
#include <openssl/evp.h>
#include <xxhash.h>

#include <algorithm>
#include <array>

#include "core/check.h"

namespace sala {
namespace {

EVP_MD_CTX* AsContext(void* context) { return static_cast<EVP_MD_CTX*>(context); }

}  // namespace

uint32_t Crc32c(const void* data, size_t bytes, uint32_t crc) {
  // crc32_iscsi works on the raw register (no initial or final XOR) and takes its length as an int.
  constexpr size_t kPiece = size_t{1} << 30;
  // The library reads only; its parameter lacks the const.
  auto* at = const_cast<unsigned char*>(static_cast<const unsigned char*>(data));
  uint32_t state = ~crc;
  while (bytes > 0) {
    const size_t piece = std::min(bytes, kPiece);
    state = crc32_iscsi(at, static_cast<int>(piece), state);
    at += piece;
    bytes -= piece;
  }
  return ~state;
}

uint64_t Xxh3(std::string_view bytes) { return XXH3_64bits(bytes.data(), bytes.size()); }

std::string Sha256Hex(std::string_view bytes) {
  Sha256 hash;
  hash.Update(bytes.data(), bytes.size());
  return hash.HexDigest();
}

std::string Hex32(uint32_t value) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text(8, '0');
  for (size_t i = 0; i < text.size(); ++i) text[i] = kDigits[(value >> (28 - 4 * i)) & 15U];
  return text;
}

Sha256::Sha256() : context_(EVP_MD_CTX_new()) {
  SALA_CHECK(context_ != nullptr &&
             EVP_DigestInit_ex(AsContext(context_), EVP_sha256(), nullptr) == 1)
      << "OpenSSL cannot start SHA-256";
}

Sha256::~Sha256() { EVP_MD_CTX_free(AsContext(context_)); }

void Sha256::Update(const void* data, size_t bytes) {
  SALA_CHECK(EVP_DigestUpdate(AsContext(context_), data, bytes) == 1) << "SHA-256 update failed";
}

std::string Sha256::HexDigest() {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  SALA_CHECK(EVP_DigestFinal_ex(AsContext(context_), digest.data(), &size) == 1)
      << "SHA-256 end failed";
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (unsigned int i = 0; i < size; ++i) {
    text += kDigits[digest[i] >> 4];
    text += kDigits[digest[i] & 15];
  }
  return text;
}

}  // namespace sala
