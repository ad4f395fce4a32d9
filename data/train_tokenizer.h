// Text and chat files -> a SentencePiece tokenizer.
//
//   TrainTokenizerOptions options{.inputs = {"texts/"}, .vocab_size = 8000, .output = "tokenizer"};
//   SALA_ASSIGN_OR_RETURN(TrainTokenizerReport report, TrainSentencePiece(options));
//
// Inputs are read as an ingest reads them (data/ingest.h): the same files of directories, archives,
// fields of records and rules for bad ones, with the same errors, except that a .txt is taken line
// by line and texts and chats may come together. Of a chat the contents of its messages are taken.
// The inputs are read twice: what is wrong with them shows before the training, and how much text
// there is decides which lines are taken. Memory: about max_bytes of text and one record.
//
// Errors: TOK-EXISTS (74): the directory holds files of a tokenizer; TOK-TRAIN (65, 78); ING-INPUT
// (66); ING-JSON, ING-FIELD, ING-UTF8, ING-NUL, ING-EMPTY, ING-FORMAT, ING-MODALITY, ING-SHAPE,
// ING-TRUNCATED, ING-CRC, ING-LONG (65); ING-RULE (78). A failure leaves no tokenizer.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "core/status.h"
#include "data/ingest.h"
#include "data/tokenizer.h"

namespace sala::data {

struct TrainTokenizerOptions {
  std::vector<std::string> inputs = {};  // files and directories
  int64_t vocab_size = 0;                // added tokens included
  std::string output = {};               // directory
  std::vector<std::string> added_tokens = {kImEnd,
                                           kImStart};  // ids after the pieces, in this order
  int64_t seed = 0;  // chooses the lines when there is more text than max_bytes
  int64_t max_bytes = int64_t{64} << 20;
  double character_coverage = 0.9999;
  IngestOptions reading = {};  // text_field, messages_field, rules, zstd_window_log, extensions
};

struct TrainTokenizerReport {
  int64_t files = 0;
  int64_t text_bytes = 0;                // lines with their ends, empty ones left out
  std::map<std::string, int64_t> cases;  // by rule name
  std::vector<std::string> passed_over;  // as in InputFiles
};

// Trains BPE with byte fallback: unk 0, bos 1, eos 2. The same texts and options give the same
// files, whatever kind of files the texts come in.
StatusOr<TrainTokenizerReport> TrainSentencePiece(const TrainTokenizerOptions& options);

}  // namespace sala::data
