// A fixture with what the operations run on: one thread, work space, and an arena for results.
#pragma once

#include <gtest/gtest.h>

#include "core/context.h"

namespace sala::testing {

class ContextTest : public ::testing::Test {
 protected:
  ContextTest() : pool_(1) {
    ctx_.pool = &pool_;
    ctx_.scratch = &scratch_;
  }

  ThreadPool pool_;
  Arena arena_, scratch_;
  Context ctx_;
};

}  // namespace sala::testing
