#include "core/hash.h"

#include <gtest/gtest.h>

#include <string>

namespace sala {
namespace {

TEST(Hash, Crc32cKnownValue) {
  EXPECT_EQ(Crc32c("123456789", 9), 0xe3069283U);
  EXPECT_EQ(Crc32c("", 0), 0U);
  // RFC 3720 B.4: 32 bytes of zeros, and of ones.
  EXPECT_EQ(Crc32c(std::string(32, '\0').data(), 32), 0x8a9136aaU);
  EXPECT_EQ(Crc32c(std::string(32, '\xff').data(), 32), 0x62a8ab43U);
}

TEST(Hash, Crc32cContinuesAtAnyCut) {
  std::string text;
  for (int i = 0; i < 300; ++i) text += static_cast<char>(i * 37);
  const uint32_t whole = Crc32c(text.data(), text.size());
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    const uint32_t first = Crc32c(text.data(), cut);
    EXPECT_EQ(Crc32c(text.data() + cut, text.size() - cut, first), whole) << cut;
  }
}

TEST(Hash, Xxh3KeyOfAKnownStreamName) {
  EXPECT_EQ(Xxh3("v1|1234|short_decay|web|0|shard_order|"), 0x48cc7e05c4ad42f0U);
  EXPECT_EQ(Xxh3(""), 0x2d06800538d394c2U);  // XXH3-64 of nothing, seed 0
}

TEST(Hash, Sha256KnownValues) {  // FIPS 180-2 examples
  EXPECT_EQ(Sha256Hex(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Hex("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  Sha256 hash;
  hash.Update("a", 1);
  hash.Update("bc", 2);
  EXPECT_EQ(hash.HexDigest(), Sha256Hex("abc"));
}

TEST(Hash, Hex32) {
  EXPECT_EQ(Hex32(0), "00000000");
  EXPECT_EQ(Hex32(0xe3069283U), "e3069283");
}

}  // namespace
}  // namespace sala
