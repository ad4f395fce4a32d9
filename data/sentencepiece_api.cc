#include "data/sentencepiece_api.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <unordered_map>

namespace sala::data {

struct SentencePieceModel::Impl {
  sentencepiece::SentencePieceProcessor processor;
};

SentencePieceModel::SentencePieceModel() : impl_(std::make_unique<Impl>()) {}
SentencePieceModel::~SentencePieceModel() = default;

std::unique_ptr<SentencePieceModel> SentencePieceModel::FromBytes(const std::string& bytes,
                                                                  std::string* error) {
  std::unique_ptr<SentencePieceModel> model(new SentencePieceModel());
  const auto status = model->impl_->processor.LoadFromSerializedProto(bytes);
  if (!status.ok()) {
    *error = status.ToString();
    return nullptr;
  }
  if (model->impl_->processor.GetPieceSize() == 0) {
    *error = "the model has no pieces";
    return nullptr;
  }
  return model;
}

std::vector<int> SentencePieceModel::Encode(std::string_view text) const {
  return impl_->processor.EncodeAsIds(text);
}

std::vector<SentencePiece> SentencePieceModel::EncodeWithOffsets(std::string_view text) const {
  const auto encoded = impl_->processor.EncodeAsImmutableProto(text);
  std::vector<SentencePiece> pieces;
  pieces.reserve(encoded.pieces_size());
  for (const auto& piece : encoded.pieces()) {
    pieces.push_back({static_cast<int32_t>(piece.id()), static_cast<int64_t>(piece.begin())});
  }
  return pieces;
}

int SentencePieceModel::size() const { return impl_->processor.GetPieceSize(); }
int SentencePieceModel::unk_id() const { return impl_->processor.unk_id(); }
int SentencePieceModel::bos_id() const { return impl_->processor.bos_id(); }
int SentencePieceModel::eos_id() const { return impl_->processor.eos_id(); }
int SentencePieceModel::pad_id() const { return impl_->processor.pad_id(); }
const std::string& SentencePieceModel::piece(int id) const {
  return impl_->processor.IdToPiece(id);
}
float SentencePieceModel::score(int id) const { return impl_->processor.GetScore(id); }
bool SentencePieceModel::is_control(int id) const { return impl_->processor.IsControl(id); }
bool SentencePieceModel::is_byte(int id) const { return impl_->processor.IsByte(id); }

int SentencePieceModel::Find(const std::string& piece) const {
  const int id = impl_->processor.PieceToId(piece);
  return id >= 0 && id < size() && this->piece(id) == piece ? id : -1;
}

namespace {

class CallbackIterator : public sentencepiece::SentenceIterator {
 public:
  explicit CallbackIterator(const std::function<bool(std::string*)>& next) : next_(next) { Next(); }
  bool done() const override { return done_; }
  void Next() override { done_ = !next_(&value_); }
  const std::string& value() const override { return value_; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  const std::function<bool(std::string*)>& next_;
  std::string value_;
  bool done_ = false;
};

}  // namespace

std::string TrainSentencePieceModel(const SentencePieceTraining& training,
                                    const std::function<bool(std::string*)>& next,
                                    std::string* model) {
  const std::unordered_map<std::string, std::string> arguments = {
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(training.vocab_size)},
      {"character_coverage", std::to_string(training.character_coverage)},
      {"max_sentencepiece_length", std::to_string(training.max_piece_length)},
      {"byte_fallback", "true"},
      {"normalization_rule_name", "identity"},
      {"add_dummy_prefix", "false"},
      {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"split_digits", "true"},
      {"num_threads", "1"},
      {"input_sentence_size", "0"},
      {"unk_id", "0"},
      {"bos_id", "1"},
      {"eos_id", "2"},
      {"pad_id", "-1"},
      {"minloglevel", "4"},
  };
  CallbackIterator iterator(next);
  const auto status = sentencepiece::SentencePieceTrainer::Train(arguments, &iterator, model);
  return status.ok() ? std::string() : status.ToString();
}

}  // namespace sala::data
