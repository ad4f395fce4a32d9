#include "model/parameters.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>

#include "core/check.h"
#include "core/rng.h"

namespace sala::model {
namespace {

constexpr int64_t kAlignment = 16;

int64_t RoundUp(int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

// Makes the specs of one unit for one tensor rank.
class SpecMaker {
 public:
  SpecMaker(int64_t unit, const TensorShard& shard) : unit_(unit), shard_(shard) {}

  // [out, in], all of it on every rank / rows dealt out / columns dealt out.
  void Whole(const std::string& name, std::vector<int64_t> shape, ParameterKind kind) {
    ParameterSpec spec = New(name, std::move(shape), kind);
    spec.copies = shard_.ranks;
    spec.owner = shard_.rank == 0;
    Add(spec);
  }
  void Rows(const std::string& name, std::vector<int64_t> shape, ParameterKind kind) {
    ParameterSpec spec = New(name, std::move(shape), kind);
    Cut(0, spec.shape[0] / shard_.ranks, shard_.rank, &spec);
    Add(spec);
  }
  void Columns(const std::string& name, int64_t out, int64_t in) {
    ParameterSpec spec = New(name, {out, in}, ParameterKind::kMatrix);
    Cut(1, in / shard_.ranks, shard_.rank, &spec);
    Add(spec);
  }
  // Rows of key/value heads: `heads` of them, where there are fewer than ranks each on several.
  void HeadRows(const std::string& name, int64_t heads, int64_t head_rows, int64_t in) {
    ParameterSpec spec = New(name, {heads * head_rows, in}, ParameterKind::kMatrix);
    spec.copies = std::max<int64_t>(1, shard_.ranks / heads);
    spec.owner = shard_.rank % spec.copies == 0;
    const int64_t parts = shard_.ranks / spec.copies;
    Cut(0, spec.shape[0] / parts, shard_.rank / spec.copies, &spec);
    Add(spec);
  }
  // Rows of the vocabulary, padded to `rows` on each rank.
  void VocabularyRows(const std::string& name, int64_t vocabulary, int64_t rows, int64_t width,
                      ParameterKind kind) {
    ParameterSpec spec = New(name, {vocabulary, width}, kind);
    const int64_t first = std::min(vocabulary, rows * shard_.rank);
    spec.shape = {rows, width};
    spec.box_offset = {first, 0};
    spec.stored = std::clamp<int64_t>(vocabulary - first, 0, rows) * width;
    Add(spec);
  }
  std::vector<ParameterSpec> Take() { return std::move(specs_); }

 private:
  ParameterSpec New(const std::string& name, std::vector<int64_t> shape, ParameterKind kind) const {
    ParameterSpec spec;
    spec.name = name;
    spec.kind = kind;
    spec.unit = unit_;
    spec.shape = shape;
    spec.box_offset.assign(shape.size(), 0);
    spec.global_shape = std::move(shape);
    spec.stored = -1;  // all
    return spec;
  }
  static void Cut(size_t dim, int64_t part, int64_t index, ParameterSpec* spec) {
    spec->shape[dim] = part;
    spec->box_offset[dim] = part * index;
  }
  void Add(ParameterSpec& spec) {
    spec.numel = 1;
    for (int64_t n : spec.shape) spec.numel *= n;
    if (spec.stored < 0) spec.stored = spec.numel;
    specs_.push_back(std::move(spec));
  }

  int64_t unit_;
  TensorShard shard_;
  std::vector<ParameterSpec> specs_;
};

// What all tensor ranks hold alike goes to the end of the unit.
void SharedLast(std::vector<ParameterSpec>& specs, size_t first) {
  std::stable_partition(specs.begin() + static_cast<std::ptrdiff_t>(first), specs.end(),
                        [](const ParameterSpec& spec) {
                          return spec.kind != ParameterKind::kVector ||
                                 spec.name.find(".o_norm.") != std::string::npos;
                        });
}

void Append(std::vector<ParameterSpec> from, std::vector<ParameterSpec>& to) {
  for (ParameterSpec& spec : from) to.push_back(std::move(spec));
}

}  // namespace

std::vector<int64_t> ParameterSpec::box_shape() const {
  std::vector<int64_t> box = shape;
  if (stored < numel) box[0] = stored / (numel / shape[0]);
  return box;
}

std::vector<ParameterSpec> MixerSpecs(const ModelConfig& config, int64_t layer, MixerType type,
                                      const TensorShard& shard) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
  const bool softmax = type == MixerType::kSoftmax;
  const int64_t hidden = config.hidden_size;
  const int64_t width = softmax ? config.attention_width() : config.lightning_width();
  const int64_t head_dim = softmax ? config.head_dim : config.lightning_head_dim;
  const int64_t kv_heads = softmax ? config.num_key_value_heads : config.lightning_nh;
  SpecMaker make(UnitOfLayer(layer), shard);
  make.Rows(prefix + "q_proj.weight", {width, hidden}, ParameterKind::kMatrix);
  make.HeadRows(prefix + "k_proj.weight", kv_heads, head_dim, hidden);
  make.HeadRows(prefix + "v_proj.weight", kv_heads, head_dim, hidden);
  // Next to q, k and v: all that read the same input are one matrix product (model/projection.h).
  if (softmax && config.attn_use_output_gate)
    make.Rows(prefix + "o_gate.weight", {width, hidden}, ParameterKind::kMatrix);
  if (!softmax && config.use_output_gate)
    make.Rows(prefix + "z_proj.weight", {width, hidden}, ParameterKind::kMatrix);
  make.Columns(prefix + "o_proj.weight", hidden, width);
  if (softmax ? config.attn_qk_norm : config.qk_norm) {
    make.Whole(prefix + "q_norm.weight", {head_dim}, ParameterKind::kVector);
    make.Whole(prefix + "k_norm.weight", {head_dim}, ParameterKind::kVector);
  }
  if (!softmax && config.use_output_norm)
    make.Rows(prefix + "o_norm.weight", {width}, ParameterKind::kVector);
  std::vector<ParameterSpec> specs = make.Take();
  SharedLast(specs, 0);
  return specs;
}

int64_t LayOut(std::vector<ParameterSpec>& specs) {
  int64_t offset = 0;
  for (ParameterSpec& spec : specs) {
    spec.offset = offset;
    offset += RoundUp(spec.numel);
  }
  return offset;
}

std::vector<ParameterSpec> ParameterSpecs(const ModelConfig& config, const TensorShard& shard) {
  const int64_t layers = config.num_hidden_layers;
  const int64_t rows = config.VocabularyRows(shard.ranks);
  std::vector<ParameterSpec> specs;
  SpecMaker embedding(UnitOfEmbedding(), shard);
  embedding.VocabularyRows("model.embed_tokens.weight", config.vocab_size, rows, config.hidden_size,
                           ParameterKind::kEmbedding);
  Append(embedding.Take(), specs);
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    const size_t first = specs.size();
    Append(MixerSpecs(config, layer, config.mixer(layer), shard), specs);
    SpecMaker make(UnitOfLayer(layer), shard);
    const std::vector<int64_t> in = {config.intermediate_size, config.hidden_size};
    make.Rows(prefix + "mlp.gate_proj.weight", in, ParameterKind::kMatrix);
    make.Rows(prefix + "mlp.up_proj.weight", in, ParameterKind::kMatrix);
    make.Columns(prefix + "mlp.down_proj.weight", config.hidden_size, config.intermediate_size);
    make.Whole(prefix + "input_layernorm.weight", {config.hidden_size}, ParameterKind::kVector);
    make.Whole(prefix + "post_attention_layernorm.weight", {config.hidden_size},
               ParameterKind::kVector);
    Append(make.Take(), specs);
    SharedLast(specs, first);
  }
  SpecMaker norm(UnitOfNorm(layers), shard);
  norm.Whole("model.norm.weight", {config.hidden_size}, ParameterKind::kVector);
  Append(norm.Take(), specs);
  if (!config.tie_word_embeddings) {
    SpecMaker head(UnitOfHead(layers), shard);
    head.VocabularyRows("lm_head.weight", config.vocab_size, rows, config.hidden_size,
                        ParameterKind::kHead);
    Append(head.Take(), specs);
  }
  LayOut(specs);
  return specs;
}

std::vector<int64_t> UnitBorders(const std::vector<ParameterSpec>& specs) {
  int64_t layers = 0;
  for (const ParameterSpec& spec : specs) {
    if (spec.kind == ParameterKind::kMatrix) layers = std::max(layers, spec.unit);
  }
  std::vector<int64_t> borders(static_cast<size_t>(UnitCount(layers)) + 1, 0);
  int64_t unit = 0;
  for (const ParameterSpec& spec : specs) {
    SALA_CHECK(unit <= spec.unit) << spec.name << " is out of order";
    unit = spec.unit;
    std::fill(borders.begin() + unit + 1, borders.end(), spec.offset + RoundUp(spec.numel));
  }
  return borders;
}

ParameterStore::ParameterStore(std::vector<ParameterSpec> specs, DType dtype, Device* device,
                               const Placement& placement)
    : specs_(std::move(specs)), dtype_(dtype), size_(LayOut(specs_)), placement_(placement) {
  borders_ = UnitBorders(specs_);
  for (size_t i = 0; i < specs_.size(); ++i) {
    SALA_CHECK(index_.emplace(specs_[i].name, i).second)
        << "parameter " << specs_[i].name << " appears twice";
  }
  int64_t elements = size_;
  if (placement.kind == Placement::kShard) {
    elements = placement.partition.shard_size(placement.rank);
  } else if (placement.kind == Placement::kSlots) {
    slots_ = SlotBorders(borders_);
    elements = slots_.back();
  }
  data_ = Buffer(static_cast<size_t>(elements) * SizeOf(dtype), device);
}

DeviceKind ParameterStore::device_kind() const {
  return data_.device() == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda;
}

int64_t ParameterStore::Place(int64_t offset) const {
  if (placement_.kind == Placement::kWhole) return offset;
  const auto next = std::upper_bound(borders_.begin(), borders_.end() - 1, offset);
  const int64_t unit = next - borders_.begin() - 1;
  if (placement_.kind == Placement::kSlots) {
    const int64_t layers = LayersOf(static_cast<int64_t>(borders_.size()) - 1);
    const auto slot = static_cast<size_t>(SlotOf(unit, layers));
    return slots_[slot] + offset - borders_[static_cast<size_t>(unit)];
  }
  const parallel::UnitPartition& partition = placement_.partition;
  const int64_t begin = partition.begin(unit, placement_.rank);
  SALA_CHECK(begin <= offset && offset <= partition.end(unit, placement_.rank))
      << "element " << offset << " is not in this rank's shard";
  return partition.shard_begin(unit, placement_.rank) + offset - begin;
}

char* ParameterStore::At(int64_t offset) const {
  return static_cast<char*>(data_.data()) + Place(offset) * static_cast<int64_t>(SizeOf(dtype_));
}

float* ParameterStore::data() {
  SALA_CHECK(dtype_ == DType::kF32 && data_.device() == nullptr && whole())
      << "the store holds " << NameOf(dtype_) << ", lies on a device or is cut";
  return static_cast<float*>(data_.data());
}

const float* ParameterStore::data() const { return const_cast<ParameterStore*>(this)->data(); }

Tensor ParameterStore::Flat() { return Flat(0, size_); }

Tensor ParameterStore::Flat(int64_t begin, int64_t end) {
  SALA_CHECK(0 <= begin && begin <= end && end <= size_)
      << "elements [" << begin << ", " << end << ") of " << size_;
  // Nothing may lie at an end that another rank has.
  void* first = begin == end ? data_.data() : At(begin);
  return Tensor(first, dtype_, {end - begin}, device_kind());
}

void ParameterStore::Zero() {
  if (data_.bytes() == 0) return;
  if (data_.device() != nullptr) {
    data_.device()->Zero(data_.data(), data_.bytes());
  } else {
    std::memset(data_.data(), 0, data_.bytes());
  }
}

int64_t ParameterStore::parameters() const {
  int64_t n = 0;
  for (const ParameterSpec& spec : specs_) n += spec.stored;
  return n;
}

int64_t ParameterStore::whole_parameters() const {
  int64_t n = 0;
  for (const ParameterSpec& spec : specs_) {
    n += std::accumulate(spec.global_shape.begin(), spec.global_shape.end(), int64_t{1},
                         std::multiplies<>());
  }
  return n;
}

const ParameterSpec& ParameterStore::Spec(const std::string& name) const {
  const auto it = index_.find(name);
  SALA_CHECK(it != index_.end()) << "no parameter " << name;
  return specs_[it->second];
}

Tensor ParameterStore::Get(const std::string& name) {
  const ParameterSpec& spec = Spec(name);
  return spec.shape.size() == 1
             ? Tensor(At(spec.offset), dtype_, {spec.shape[0]}, device_kind())
             : Tensor(At(spec.offset), dtype_, {spec.shape[0], spec.shape[1]}, device_kind());
}

ConstTensor ParameterStore::Get(const std::string& name) const {
  return const_cast<ParameterStore*>(this)->Get(name);
}

void ParameterStore::ForEachPart(
    const ParameterSpec& spec, const std::function<void(int64_t begin, int64_t end)>& part) const {
  if (placement_.kind != Placement::kShard) {
    if (spec.stored > 0) part(0, spec.stored);
    return;
  }
  const parallel::UnitPartition& partition = placement_.partition;
  const int64_t begin =
      std::max<int64_t>(0, partition.begin(spec.unit, placement_.rank) - spec.offset);
  const int64_t end =
      std::min(spec.stored, partition.end(spec.unit, placement_.rank) - spec.offset);
  if (begin < end) part(begin, end);
}

ComputeParameters::ComputeParameters(const Context& ctx, ParameterStore& host, parallel::Mesh* mesh)
    : host_(&host),
      mesh_(mesh),
      on_device_(ctx.cuda()),
      sharded_(mesh != nullptr && mesh->zero_stage() == 3) {
  if (sharded_) {
    partition_ = parallel::UnitPartition(host.unit_borders(), mesh->param_size());
    std::vector<int64_t> sizes;
    for (int64_t u = 0; u < partition_.units(); ++u) sizes.push_back(partition_.unit_size(u));
    slots_ = SlotSchedule(std::move(sizes));
  }
  pending_.assign(host.unit_borders().size() - 1, 0);
  if (on_device_ || sharded_) {
    store_ = std::make_unique<ParameterStore>(host.specs(), ctx.activation(), ctx.gpu,
                                              sharded_ ? Placement::Slots() : Placement());
  }
  if (on_device_ && sharded_) {
    shard_ = std::make_unique<ParameterStore>(host.specs(), ctx.activation(), ctx.gpu,
                                              Placement::Shard(partition_, mesh->param_rank()));
  }
  if (mesh != nullptr) store().set_hooks(this);
  if (on_device_) Refresh(ctx);
}

ComputeParameters::~ComputeParameters() {
  if (mesh_ != nullptr) mesh_->queue().Drain();
  if (store().hooks() == this) store().set_hooks(nullptr);
}

Tensor ComputeParameters::Own(int64_t begin, int64_t end) {
  if (shard_) return shard_->Flat(begin, end);
  return sharded_ ? host_->Flat(begin, end) : store().Flat(begin, end);
}

void ComputeParameters::Refresh(const Context& ctx) {
  if (!on_device_) {
    slots_.Forget();
    return;
  }
  constexpr int64_t kPiece = int64_t{1} << 20;
  std::vector<BF16> rounded;
  ParameterStore& to = shard_ ? *shard_ : *store_;
  for (const ParameterSpec& spec : host_->specs()) {
    to.ForEachPart(spec, [&](int64_t first, int64_t last) {
      for (int64_t begin = first; begin < last; begin += kPiece) {
        const int64_t end = std::min(last, begin + kPiece);
        const auto* values = host_->Flat(spec.offset + begin, spec.offset + end).Data<float>();
        rounded.resize(static_cast<size_t>(end - begin));
        for (int64_t i = begin; i < end; ++i)
          rounded[static_cast<size_t>(i - begin)] = BF16(values[i - begin]);
        ctx.gpu->Upload(to.Flat(spec.offset + begin, spec.offset + end).raw(), rounded.data(),
                        rounded.size() * sizeof(BF16));
      }
    });
  }
  slots_.Forget();
}

void ComputeParameters::Share(int64_t u, const parallel::UnitPartition& partition) {
  if (sharded_) {
    slots_.Forget();
  } else if (mesh_ != nullptr && mesh_->param_size() > 1 && partition.unit_size(u) > 0) {
    Gather(u, partition);
  }
}

void ComputeParameters::Gather(int64_t u, const parallel::UnitPartition& partition) {
  const int rank = mesh_->param_rank();
  const ConstTensor mine = Own(partition.begin(u, rank), partition.end(u, rank));
  const Tensor all = store().Flat(partition.unit_begin(u), partition.unit_end(u));
  pending_[static_cast<size_t>(u)] =
      mesh_->queue().Submit([this, mine, all, counts = partition.counts(u)] {
        return mesh_->background_param_group().AllGather(mine, counts, all);
      });
}

void ComputeParameters::Settle() {
  if (mesh_ != nullptr) parallel::OrThrow(mesh_->queue().WaitAll());
  std::fill(pending_.begin(), pending_.end(), 0);
}

void ComputeParameters::Enter(int64_t unit) {
  if (mesh_ == nullptr || mesh_->planning()) return;
  if (sharded_) slots_.Enter(unit, [this](int64_t u) { Gather(u, partition_); });
  parallel::CommQueue::Ticket& ticket = pending_[static_cast<size_t>(unit)];
  if (ticket == 0) return;
  parallel::OrThrow(mesh_->queue().Wait(ticket));
  ticket = 0;
}

size_t ComputeParameters::bytes() const {
  return (store_ ? store_->bytes() : 0) + (shard_ ? shard_->bytes() : 0);
}

void FillTensor(ParameterStore& store, const ParameterSpec& spec,
                const std::function<double()>& next) {
  // The box's rows and columns in the whole tensor; vectors are one row.
  const bool matrix = spec.shape.size() == 2;
  const int64_t rows = matrix ? spec.global_shape[0] : 1;
  const int64_t columns = spec.global_shape.back();
  const int64_t first_row = matrix ? spec.box_offset[0] : 0;
  const int64_t first_column = spec.box_offset.back();
  const int64_t width = spec.shape.back();
  const int64_t end_row = first_row + spec.stored / width;
  std::vector<float> values(static_cast<size_t>(spec.stored));
  auto to = values.begin();
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const double value = next();
      const bool mine = first_row <= row && row < end_row && first_column <= column &&
                        column < first_column + width;
      if (mine) *to++ = static_cast<float>(value);
    }
  }
  store.ForEachPart(spec, [&](int64_t begin, int64_t end) {
    std::copy(values.begin() + begin, values.begin() + end,
              store.Flat(spec.offset + begin, spec.offset + end).Data<float>());
  });
}

void InitialiseNormal(int64_t seed, double standard_deviation, ParameterStore& store,
                      const std::string& name) {
  PhiloxStream rng("v1|" + std::to_string(seed) + "|init||0|parameter|" + name);
  FillTensor(store, store.Spec(name), [&] { return standard_deviation * rng.NextNormal(); });
}

void InitialiseParameters(const ModelConfig& config, int64_t seed, ParameterStore& store) {
  const double matrix = config.initializer_range / std::sqrt(config.width_multiplier());
  for (const ParameterSpec& spec : store.specs()) {
    switch (spec.kind) {
      case ParameterKind::kVector:
        FillTensor(store, spec, [] { return 1.0; });
        break;
      case ParameterKind::kMatrix:
        InitialiseNormal(seed, matrix, store, spec.name);
        break;
      case ParameterKind::kEmbedding:
      case ParameterKind::kHead:
        InitialiseNormal(seed, config.initializer_range, store, spec.name);
        break;
    }
  }
}

}  // namespace sala::model
