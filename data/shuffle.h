// Token stores made from token stores: shuffled, and several as one.
//
// The order of a shuffled store is a function of the seed and the documents alone: each document is
// sorted by a Philox draw whose counter is its hash and its number among the documents of that
// hash, which are numbered in the order of their tokens' hash and their source. So copies of a text
// are spread, and neither the order of the input nor the memory allowed changes anything. Documents
// are scattered to as many bucket files as memory asks for, by the first bits of their first draw;
// then copies to the buckets of theirs; then each bucket is read, sorted and added to the new
// store. All documents of one text are in memory together once. OUT/shuffle.buckets takes the space
// of the tokens once more while it runs; what a killed run left there is removed.
//
// Errors: DS-EXISTS (74), DS-KIND (65): stores of text and of chats; TOK-MISMATCH (65): stores of
// two tokenizers; DS-CRC (65): a bucket that is read otherwise than it was written.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/token_store.h"

namespace sala::data {

struct ShuffleOptions {
  std::string input = {}, output = {};
  std::string name = {};  // empty: as the input
  int64_t seed = 0;
  int64_t memory_bytes = int64_t{1}
                         << 30;  // about what a bucket takes, or all that is not yet in one
  int64_t shard_tokens = int64_t{256} << 20;
};
StatusOr<DatasetInfo> ShuffleDataset(const ShuffleOptions& options);

// Documents in the order of the inputs. Sources that are the same in name, licence and note become
// one.
struct MergeOptions {
  std::vector<std::string> inputs = {};
  std::string output = {}, name = {};
  int64_t shard_tokens = int64_t{256} << 20;
};
StatusOr<DatasetInfo> MergeDatasets(const MergeOptions& options);

}  // namespace sala::data
