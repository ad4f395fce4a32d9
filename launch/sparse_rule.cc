#include "launch/sparse_rule.h"

#include "core/config.h"

namespace sala::launch {
namespace {

// The one key of a stage's configuration that matters here.
struct SparseKey {
  bool sparse_attention = false;
  void Bind(ConfigBinder& b) { b.Field("sparse_attention", &sparse_attention); }
};

}  // namespace

StatusOr<bool> UseSparseAttention(const std::string& choice, const std::string& path,
                                  const recipes::LoadedModel& loaded) {
  if (choice != "auto") return choice == "on";
  if (!loaded.checkpoint) return loaded.config.has_lightning();
  SALA_ASSIGN_OR_RETURN(const std::string yaml, loaded.checkpoint->ReadConfig());
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document,
                        ConfigDocument::Parse(yaml, path + "/config.yaml"));
  SparseKey key;
  static_cast<void>(BindConfig(document, &key));  // complains of all the other keys
  return key.sparse_attention;
}

}  // namespace sala::launch
