#include "tests/cuda/bench/measure.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "core/check.h"
#include "core/clock.h"
#include "nlohmann/json.hpp"

namespace sala::bench {
namespace {

constexpr int kWarmUpMark = 0;  // and 1; samples use the ones behind
constexpr int kMostSamples = 25;
constexpr double kSampleSeconds = 2e-3;
constexpr int kMostSets = 8;
// Elements of a pattern; a prime, so that no row of a matrix repeats another at its own place.
constexpr int64_t kPattern = 1048573;

}  // namespace

double Median(std::vector<double> values) {
  SALA_CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  const size_t n = values.size();
  return n % 2 == 1 ? values[n / 2] : 0.5 * (values[n / 2 - 1] + values[n / 2]);
}

std::string Gib(double bytes) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2f GiB", bytes / double{1 << 30});
  return text;
}

Bench::Bench(Settings settings, Device& device)
    : settings_(std::move(settings)),
      device_(device),
      pool_(1),
      patterns_(size_t{1} << 20, &device) {
  ResetScratch();
  if (!settings_.json.empty()) {
    std::FILE* file = std::fopen(settings_.json.c_str(), "w");
    SALA_CHECK(file != nullptr) << "cannot write " << settings_.json;
    std::fclose(file);
  }
}

Bench::~Bench() = default;

Context Bench::ctx() { return {DeviceKind::kCuda, &pool_, scratch_.get(), &device_}; }

void Bench::ResetScratch(size_t reserve) {
  device_.Synchronize();
  scratch_ = std::make_unique<Arena>(size_t{1} << 20, &device_);
  if (reserve > 0) scratch_->Reserve(reserve);
}

bool Bench::Wanted(const std::string& name) const {
  return settings_.only.empty() || name.find(settings_.only) != std::string::npos;
}

int Bench::SetsOf(double set_bytes) const {
  if (settings_.smoke) return 2;
  const auto enough = 4 * static_cast<double>(device_.info().l2_bytes);
  if (set_bytes <= 0 || set_bytes >= enough) return 1;
  return std::clamp(static_cast<int>(std::ceil(enough / set_bytes)), 2, kMostSets);
}

void Bench::Run(const Case& what, const Prepare& prepare) {
  if (!Wanted(what.name)) return;
  if (!what.available) {
    Skip(what, "the module has no such operation");
    return;
  }
  ResetScratch();
  const auto free = 0.9 * static_cast<double>(device_.free_bytes());
  int sets = SetsOf(what.set_bytes);
  if (!settings_.smoke && what.set_bytes > 0) {
    if (what.set_bytes > free) {
      Skip(what, "needs " + Gib(what.set_bytes) + ", free are " + Gib(free));
      return;
    }
    sets = std::min(sets, static_cast<int>(free / what.set_bytes));
  }
  try {
    Arena arena(size_t{1} << 20, &device_);
    const Call call = prepare(arena, sets);
    for (int set = 0; set < sets; ++set) call(set);
    device_.MarkTime(kWarmUpMark);
    call(0);
    device_.MarkTime(kWarmUpMark + 1);
    const double one = std::max(1e-7, device_.SecondsBetween(kWarmUpMark, kWarmUpMark + 1));
    const auto calls =
        settings_.smoke
            ? 1
            : static_cast<int>(std::clamp(std::ceil(kSampleSeconds / one), 1.0, 1000.0));
    const auto samples = settings_.smoke
                             ? 3
                             : static_cast<int>(std::clamp(settings_.seconds / (one * calls), 5.0,
                                                           double{kMostSamples}));
    std::vector<double> host;
    std::vector<double> times;
    int next = 0;
    for (int s = 0; s < samples; ++s) {
      const double start = ClockSeconds();
      device_.MarkTime(2 + 2 * s);
      for (int i = 0; i < calls; ++i) call(next++ % sets);
      device_.MarkTime(3 + 2 * s);
      host.push_back((ClockSeconds() - start) / calls);
    }
    for (int s = 0; s < samples; ++s)
      times.push_back(device_.SecondsBetween(2 + 2 * s, 3 + 2 * s) / calls);
    Add({{"section", what.section},
         {"name", what.name},
         {"shape", what.shape},
         {"tokens", what.tokens},
         {"seconds", Median(times)},
         {"low", *std::min_element(times.begin(), times.end())},
         {"high", *std::max_element(times.begin(), times.end())},
         {"samples", samples},
         {"calls", calls},
         {"sets", sets},
         {"host_seconds", Median(host)},
         {"flops", what.flops},
         {"bytes", what.bytes},
         {"note", what.note}});
  } catch (const DeviceError& error) {
    // Only what says that memory ran out leaves the device usable.
    if (error.code() != "CUDA-MEMORY") throw;
    Skip(what, error.what());
  }
}

std::vector<double> Bench::Time(int samples, const std::function<void()>& call) {
  std::vector<double> times;
  for (int s = 0; s < samples; ++s) {
    device_.MarkTime(kWarmUpMark);
    call();
    device_.MarkTime(kWarmUpMark + 1);
    times.push_back(device_.SecondsBetween(kWarmUpMark, kWarmUpMark + 1));
  }
  return times;
}

void Bench::Add(nlohmann::ordered_json row) {
  ++rows_;
  if (row.contains("seconds")) {
    const double seconds = row["seconds"];
    if (row["name"] == "limit_product") product_rate_ = row["flops"].get<double>() / seconds;
    std::printf("%-28s %-44s %12.3f us", row["name"].get<std::string>().c_str(),
                row["shape"].get<std::string>().c_str(), seconds * 1e6);
    if (row.value("flops", 0.0) > 0)
      std::printf(" %9.2f TFLOP/s", row["flops"].get<double>() / seconds * 1e-12);
    if (row.value("bytes", 0.0) > 0)
      std::printf(" %9.2f GB/s", row["bytes"].get<double>() / seconds * 1e-9);
    std::printf("\n");
  } else {
    std::printf("%-28s %-44s %s\n", row["name"].get<std::string>().c_str(),
                row["shape"].get<std::string>().c_str(), row.value("skipped", "").c_str());
  }
  std::fflush(stdout);
  if (settings_.json.empty()) return;
  // Closed after each row: a run that is stopped at its time limit leaves what it has.
  std::FILE* file = std::fopen(settings_.json.c_str(), "a");
  SALA_CHECK(file != nullptr) << "cannot write " << settings_.json;
  std::fprintf(file, "%s\n", row.dump().c_str());
  std::fclose(file);
}

void Bench::Skip(const Case& what, const std::string& why) {
  Add({{"section", what.section},
       {"name", what.name},
       {"shape", what.shape},
       {"tokens", what.tokens},
       {"skipped", "skipped: " + why},
       {"note", what.note}});
}

Tensor Bench::New(Arena& arena, DType dtype, std::initializer_list<int64_t> shape) {
  const auto bytes = static_cast<size_t>(NumElements(shape)) * SizeOf(dtype);
  return {arena.Allocate(bytes), dtype, shape, DeviceKind::kCuda};
}

Tensor Bench::Random(Arena& arena, DType dtype, std::initializer_list<int64_t> shape, float scale) {
  const Tensor tensor = New(arena, dtype, shape);
  Fill(tensor, scale);
  return tensor;
}

const void* Bench::Pattern(DType dtype, float scale) {
  void*& pattern = pattern_of_[{dtype, scale}];
  if (pattern != nullptr) return pattern;
  std::mt19937 engine(97);
  std::vector<unsigned char> host(static_cast<size_t>(kPattern) * SizeOf(dtype));
  for (int64_t i = 0; i < kPattern; ++i) {
    const float value = scale *
                        static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(engine()))) *
                        0x1p-31F;
    const BF16 half(value);
    const void* from = dtype == DType::kBF16 ? static_cast<const void*>(&half) : &value;
    std::memcpy(host.data() + static_cast<size_t>(i) * SizeOf(dtype), from, SizeOf(dtype));
  }
  pattern = patterns_.Allocate(host.size());
  device_.Upload(pattern, host.data(), host.size());
  return pattern;
}

// Pieces of the pattern, each from another place of it.
void Bench::Fill(const Tensor& tensor, float scale) {
  SALA_CHECK(tensor.contiguous());
  SALA_CHECK(tensor.dtype() == DType::kBF16 || tensor.dtype() == DType::kF32);
  const auto size = static_cast<int64_t>(SizeOf(tensor.dtype()));
  const auto* pattern = static_cast<const char*>(Pattern(tensor.dtype(), scale));
  auto* to = static_cast<char*>(tensor.raw());
  int64_t left = tensor.numel();
  while (left > 0) {
    // 16-byte borders, so that the copies are fast.
    pattern_offset_ = (pattern_offset_ + 77777 * 8) % (kPattern / 2 / 8 * 8);
    const int64_t piece = std::min(left, (kPattern - pattern_offset_) / 8 * 8);
    device_.Copy(to, pattern + pattern_offset_ * size, static_cast<size_t>(piece * size));
    to += piece * size;
    left -= piece;
  }
}

Tensor Bench::Ones(Arena& arena, DType dtype, int64_t count) {
  const Tensor tensor = New(arena, dtype, {count});
  std::vector<unsigned char> host(static_cast<size_t>(count) * SizeOf(dtype));
  for (int64_t i = 0; i < count; ++i) {
    const float one = 1.0F;
    const BF16 half(one);
    const void* from = dtype == DType::kBF16 ? static_cast<const void*>(&half) : &one;
    std::memcpy(host.data() + static_cast<size_t>(i) * SizeOf(dtype), from, SizeOf(dtype));
  }
  device_.Upload(tensor.raw(), host.data(), host.size());
  return tensor;
}

ConstTensor Bench::Integers(Arena& arena, const std::vector<int32_t>& values) {
  const auto count = static_cast<int64_t>(values.size());
  const Tensor tensor = New(arena, DType::kI32, {count});
  device_.Upload(tensor.raw(), values.data(), values.size() * sizeof(int32_t));
  return tensor;
}

std::vector<int32_t> Bench::RandomIds(int64_t count, int64_t limit) {
  std::mt19937 engine(5);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids)
    id = static_cast<int32_t>(static_cast<uint32_t>(engine()) % static_cast<uint32_t>(limit));
  return ids;
}

}  // namespace sala::bench
