// The main function of a test program that runs under mpirun.
#pragma once

#include <gtest/gtest.h>

#include "parallel/mpi_communicator.h"

namespace sala::testing {

// Runs all tests with `world` set to all ranks of the job.
inline int RunTestsOnRanks(int argc, char** argv, parallel::Communicator** world) {
  ::testing::InitGoogleTest(&argc, argv);
  auto session = parallel::MpiSession::Start(&argc, &argv);
  if (!session.ok()) return 1;
  auto all = (*session)->World();
  if (!all.ok()) return 1;
  *world = all->get();
  return RUN_ALL_TESTS();
}

}  // namespace sala::testing
