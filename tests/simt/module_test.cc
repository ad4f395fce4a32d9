// The emulator in a shared library that is loaded at run time, beside the copy in this program:
// thread variables, the sanitizers' hooks and the stand-ins must work there too.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace {

using Reverse = int (*)(const int* in, int* out, int n);

void TestReverse(Reverse reverse) {
  std::vector<int> in(96);
  std::vector<int> out(96);
  for (int i = 0; i < 96; ++i) in[i] = i;
  ASSERT_EQ(reverse(in.data(), out.data(), 96), 0);
  for (int i = 0; i < 96; ++i) EXPECT_EQ(out[i], 95 - i);
}

TEST(Module, RunsKernelsAfterDlopen) {
  void* module = dlopen(SIMT_SAMPLE_MODULE, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(module, nullptr) << dlerror();
  const auto reverse = reinterpret_cast<Reverse>(dlsym(module, "SimtSampleReverse"));
  ASSERT_NE(reverse, nullptr);
  TestReverse(reverse);
  std::thread(TestReverse, reverse).join();
}

}  // namespace
