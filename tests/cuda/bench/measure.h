// How cuda_bench measures: data on the device, time by marks on the compute stream, one row for
// each case.
//
// A case has `sets` of operands, several times the L2 cache in total, and its calls go through them
// in turn, so that no call finds its operands in the cache. Each set is used once to warm up (plans
// are made, pages touched). Then samples are taken, each of as many calls as last about 2 ms, until
// the time for a case is spent; the row has their median, the smallest and the largest. Data are
// random numbers, never zeros, which compute faster.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/context.h"
#include "nlohmann/json_fwd.hpp"

namespace sala::bench {

struct Settings {
  bool smoke = false;    // tiny shapes: that the code runs, no numbers worth reading
  double seconds = 0.5;  // of device time for each case, without warm-up
  std::string only;      // cases whose name contains this text
  std::string json;      // file for the rows, one JSON object a line; "" for none
};

struct Case {
  std::string section;
  std::string name;  // with `tokens`, what rows of other programs are matched by
  std::string shape;
  int64_t tokens = 0;
  double flops = 0;       // useful work of one call (model/work.h); 0: limited by memory alone
  double bytes = 0;       // useful traffic of one call
  double set_bytes = 0;   // memory of one set of operands
  bool available = true;  // the module has the operation
  std::string note;
};

class Bench {
 public:
  // One call on set number `set`.
  using Call = std::function<void(int set)>;
  // Makes the operands of `sets` sets in `arena`, which lives as long as the case.
  using Prepare = std::function<Call(Arena& arena, int sets)>;

  Bench(Settings settings, Device& device);
  ~Bench();
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  const Settings& settings() const { return settings_; }
  bool smoke() const { return settings_.smoke; }
  Device& device() { return device_; }
  // With a scratch arena of its own.
  Context ctx();
  // What is in scratch now is given back to the device.
  void ResetScratch(size_t reserve = 0);

  bool Wanted(const std::string& name) const;
  void Run(const Case& what, const Prepare& prepare);
  // Seconds of one call after one that warms up: for calls that last seconds. `samples` of them.
  std::vector<double> Time(int samples, const std::function<void()>& call);
  // A row made elsewhere; `row` has at least section, name, shape and tokens.
  void Add(nlohmann::ordered_json row);
  void Skip(const Case& what, const std::string& why);

  // Uninitialised, and random in [-scale, scale).
  Tensor New(Arena& arena, DType dtype, std::initializer_list<int64_t> shape);
  Tensor Random(Arena& arena, DType dtype, std::initializer_list<int64_t> shape,
                float scale = 1.0F);
  void Fill(const Tensor& tensor, float scale);
  Tensor Ones(Arena& arena, DType dtype, int64_t count);
  ConstTensor Integers(Arena& arena, const std::vector<int32_t>& values);
  // [0, limit), the same for the same count and limit.
  static std::vector<int32_t> RandomIds(int64_t count, int64_t limit);

  int rows() const { return rows_; }
  // Operations per second of the large product of LimitCases; 0 before it ran.
  double product_rate() const { return product_rate_; }

 private:
  int SetsOf(double set_bytes) const;
  // A piece of random numbers on the device from which tensors are filled.
  const void* Pattern(DType dtype, float scale);

  Settings settings_;
  Device& device_;
  ThreadPool pool_;
  std::unique_ptr<Arena> scratch_;
  Arena patterns_;
  std::map<std::pair<DType, float>, void*> pattern_of_;
  int64_t pattern_offset_ = 0;
  int rows_ = 0;
  double product_rate_ = 0;
};

double Median(std::vector<double> values);
std::string Gib(double bytes);  // "1.50 GiB"

}  // namespace sala::bench
