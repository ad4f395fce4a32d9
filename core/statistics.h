// Numbers about numbers.
#pragma once

#include <vector>

namespace sala {

// The middle one, of an even number the mean of the middle two; 0 of none.
double Median(std::vector<double> values);

}  // namespace sala
