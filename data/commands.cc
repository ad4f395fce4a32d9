#include "data/commands.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "core/file.h"
#include "core/hash.h"

namespace sala::data {
namespace {

std::string Thousands(int64_t value) {
  std::string text = std::to_string(value);
  for (int64_t at = static_cast<int64_t>(text.size()) - 3; at > 0; at -= 3)
    text.insert(static_cast<size_t>(at), ",");
  return text;
}

StatusOr<TokenStore::Place> LocateInFile(const TokenStore& store, const std::string& name,
                                         int64_t n) {
  const auto& files = store.info().files;
  for (size_t f = 0; f < files.size(); ++f) {
    if (files[f].name != name && std::to_string(f) != name) continue;
    if (n < files[f].documents) return TokenStore::Place{static_cast<int64_t>(f), n};
    return MakeError(ExitCode::kUsage, "DS-DOCUMENT",
                     store.info().directory + ": no document " + std::to_string(n) + " in " +
                         files[f].name + "; it has documents 0 to " +
                         std::to_string(files[f].documents - 1));
  }
  return MakeError(ExitCode::kUsage, "DS-DOCUMENT",
                   store.info().directory + ": no file " + Printable(name) +
                       "; the dataset has files 0 (" + files[0].name + ") to " +
                       std::to_string(files.size() - 1));
}

}  // namespace

StatusOr<std::string> DescribeDataset(const std::string& directory, bool as_json) {
  SALA_ASSIGN_OR_RETURN(const DatasetInfo info, ReadDatasetInfo(directory));
  if (as_json) {
    SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(directory + "/dataset.json"));
    nlohmann::json out = nlohmann::json::parse(text);  // checked by the call before
    out["directory"] = directory;
    out["fingerprint"] = info.fingerprint;
    return out.dump(2);
  }
  std::ostringstream out;
  out << "dataset      " << info.name << " (" << info.kind << ")\n"
      << "fingerprint  " << info.fingerprint << "\n"
      << "documents    " << Thousands(info.documents) << "\n"
      << "tokens       " << Thousands(info.tokens) << " (" << Thousands(info.target_tokens)
      << " targets), " << info.token_dtype << "\n"
      << "tokenizer    " << info.tokenizer_name << " of " << Thousands(info.vocab_size)
      << " tokens, " << info.tokenizer_fingerprint << (info.add_bos ? ", bos" : "")
      << (info.add_eos ? ", eos" : "") << "\n"
      << "shuffled     " << (info.ingest.value("shuffled", false) ? "yes" : "no") << "\n";
  for (const DatasetFile& f : info.files) {
    out << "file         " << f.name << "  " << Thousands(f.bytes) << " bytes, "
        << Thousands(f.documents) << " documents, " << Thousands(f.tokens) << " tokens, longest "
        << Thousands(f.max_document) << "\n";
  }
  for (const DatasetSource& s : info.sources) {
    out << "source       " << s.name << "  " << Thousands(s.documents) << " documents, "
        << Thousands(s.tokens) << " tokens, licence "
        << (s.license.empty() ? "not stated" : s.license) << (s.note.empty() ? "" : ", " + s.note)
        << "\n";
  }
  for (size_t i = 0; i < info.length_histogram.size(); ++i) {
    if (info.length_histogram[i] == 0) continue;
    out << "length       " << Thousands(int64_t{1} << i) << " to "
        << Thousands((int64_t{2} << i) - 1) << ": " << Thousands(info.length_histogram[i])
        << " documents\n";
  }
  return out.str();
}

StatusOr<std::string> VerifyDataset(const std::string& directory, bool full, bool as_json) {
  SALA_ASSIGN_OR_RETURN(auto store, TokenStore::Open(directory));
  const DatasetInfo& info = store->info();
  for (int64_t f = 0; f < store->files(); ++f) {
    const DatasetFile& entry = info.files[static_cast<size_t>(f)];
    SALA_ASSIGN_OR_RETURN(TokenFile * file, store->File(f));
    if (!full) continue;
    SALA_RETURN_IF_ERROR(file->VerifyAll());
    Sha256 sha;
    SALA_ASSIGN_OR_RETURN(const MappedFile map, MappedFile::Open(directory + "/" + entry.name));
    sha.Update(map.data(), map.size());
    const std::string found = sha.HexDigest();
    if (found != entry.sha256) {
      return MakeError(ExitCode::kData, "DS-CRC",
                       directory + "/" + entry.name + ": SHA-256 is " + found +
                           ", dataset.json says " + Printable(entry.sha256) +
                           "; restore the file or ingest again");
    }
  }
  if (as_json) {
    return nlohmann::json({{"dataset", directory},
                           {"fingerprint", info.fingerprint},
                           {"documents", info.documents},
                           {"tokens", info.tokens},
                           {"files", store->files()},
                           {"checked", full ? "full" : "quick"}})
        .dump(2);
  }
  return directory + ": " + Thousands(info.documents) + " documents and " + Thousands(info.tokens) +
         " tokens in " + std::to_string(store->files()) + " files, " +
         (full ? "every byte checked" : "sizes and headers checked") + ", no fault";
}

StatusOr<std::string> ShowDocument(const std::string& directory, int64_t n, const Tokenizer* decode,
                                   const std::string& file_name) {
  SALA_ASSIGN_OR_RETURN(auto store, TokenStore::Open(directory));
  if (decode != nullptr) SALA_RETURN_IF_ERROR(store->CheckTokenizer(*decode));
  SALA_ASSIGN_OR_RETURN(const TokenStore::Place place,
                        file_name.empty() ? store->Locate(n) : LocateInFile(*store, file_name, n));
  SALA_ASSIGN_OR_RETURN(TokenFile * file, store->File(place.file));
  const int64_t length = file->length(place.document);
  std::vector<int32_t> ids(static_cast<size_t>(length));
  std::vector<uint8_t> mask(ids.size(), 0);
  SALA_RETURN_IF_ERROR(file->CopyTokens(file->begin(place.document), length, ids.data()));
  if (store->info().sft())
    SALA_RETURN_IF_ERROR(file->CopyMask(file->begin(place.document), length, mask.data()));
  std::ostringstream out;
  out << "document " << n << ": file " << store->info().files[static_cast<size_t>(place.file)].name
      << ", source "
      << store->info().sources[static_cast<size_t>(file->source(place.document))].name << ", "
      << Thousands(length) << " tokens\n";
  for (size_t begin = 0; begin < ids.size();) {  // runs of equal mask
    size_t end = begin;
    while (end < ids.size() && mask[end] == mask[begin]) ++end;
    if (decode != nullptr) {
      const std::string text =
          decode->Decode(std::span<const int32_t>(ids).subspan(begin, end - begin));
      out << (mask[begin] != 0 ? "[[" + text + "]]" : text);
    } else {
      for (size_t i = begin; i < end; ++i)
        out << (i > 0 ? " " : "") << ids[i] << (mask[i] != 0 ? "*" : "");
    }
    begin = end;
  }
  out << "\n";
  return out.str();
}

}  // namespace sala::data
