// gemm_bench: the three matrix products at shapes of training, one thread, in GFLOP/s; OpenBLAS on
// the same data beside it.
//
//   OPENBLAS_NUM_THREADS=1 build/release/bin/gemm_bench --benchmark_filter=NT
#include <benchmark/benchmark.h>

#include <array>
#include <string>
#include <vector>

#include "kernels/common/instruction_set.h"
#include "kernels/gemm/gemm.h"

#if defined(SALA_HAVE_OPENBLAS)
#include <cblas.h>
#endif

namespace sala::kernels {
namespace {

enum class Form : uint8_t { kNT, kNN, kTN };
struct Shape {
  int64_t m, n, k;
};

constexpr std::array<Shape, 8> kShapes = {{{64, 64, 64},
                                           {128, 16, 64},
                                           {128, 64, 64},
                                           {128, 128, 128},
                                           {384, 1024, 2048},
                                           {512, 4096, 384},
                                           {2048, 384, 1024},
                                           {2048, 1024, 384}}};

struct Data {
  explicit Data(const Shape& s)
      : a(static_cast<size_t>(s.m * s.k), 0.5F),
        b(static_cast<size_t>(s.n * s.k), 0.25F),
        c(static_cast<size_t>(s.m * s.n), 0.0F) {}
  std::vector<float> a, b, c;
};

void Report(benchmark::State& state, const Shape& s) {
  state.counters["GFLOP/s"] = benchmark::Counter(2e-9 * static_cast<double>(s.m * s.n * s.k),
                                                 benchmark::Counter::kIsIterationInvariantRate);
}

void RunOwn(benchmark::State& state, Form form, InstructionSet set, const Shape& s) {
  SetInstructionSetForTesting(set);
  Data data(s);
  Arena arena;
  ThreadPool pool(1);
  const Context ctx{DeviceKind::kCpu, &pool, &arena};
  const Tensor c(data.c.data(), {s.m, s.n});
  for (auto _ : state) {
    switch (form) {
      case Form::kNT:
        GemmNT(ctx, Tensor(data.a.data(), {s.m, s.k}), Tensor(data.b.data(), {s.n, s.k}), c);
        break;
      case Form::kNN:
        GemmNN(ctx, Tensor(data.a.data(), {s.m, s.k}), Tensor(data.b.data(), {s.k, s.n}), c);
        break;
      case Form::kTN:
        GemmTN(ctx, Tensor(data.a.data(), {s.k, s.m}), Tensor(data.b.data(), {s.k, s.n}), c);
        break;
    }
    benchmark::ClobberMemory();
  }
  Report(state, s);
}

#if defined(SALA_HAVE_OPENBLAS)
void RunOpenBlas(benchmark::State& state, Form form, const Shape& s) {
  Data data(s);
  const auto m = static_cast<int>(s.m);
  const auto n = static_cast<int>(s.n);
  const auto k = static_cast<int>(s.k);
  const bool ta = form == Form::kTN;
  const bool tb = form == Form::kNT;
  for (auto _ : state) {
    cblas_sgemm(CblasRowMajor, ta ? CblasTrans : CblasNoTrans, tb ? CblasTrans : CblasNoTrans, m, n,
                k, 1.0F, data.a.data(), ta ? m : k, data.b.data(), tb ? k : n, 0.0F, data.c.data(),
                n);
    benchmark::ClobberMemory();
  }
  Report(state, s);
}
#endif

void RegisterAll() {
  const std::array<std::pair<Form, const char*>, 3> forms = {
      {{Form::kNT, "NT"}, {Form::kNN, "NN"}, {Form::kTN, "TN"}}};
  for (const Shape& s : kShapes) {
    for (const auto& [form, name] : forms) {
      const std::string label = std::string(name) + "/" + std::to_string(s.m) + "x" +
                                std::to_string(s.n) + "x" + std::to_string(s.k) + "/";
      for (InstructionSet set : SupportedInstructionSets()) {
        if (set == InstructionSet::kPortable) continue;
        benchmark::RegisterBenchmark((label + std::string(NameOf(set))).c_str(), RunOwn, form, set,
                                     s);
      }
#if defined(SALA_HAVE_OPENBLAS)
      benchmark::RegisterBenchmark((label + "openblas").c_str(), RunOpenBlas, form, s);
#endif
    }
  }
}

}  // namespace
}  // namespace sala::kernels

int main(int argc, char** argv) {
  sala::kernels::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
