// The recurrence of one document in plain loops, forward and backward, for every head: the standard
// for the chunked kernels. Number is double, or std::complex<double> to take derivatives by complex
// step.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace sala::kernels::reference {

// Of n heads: with p the largest power of two up to n, 2^(-8 i / p) for i = 1..p, then for the
// other heads every second of 2p heads' list; rounded to float32.
inline std::vector<double> LightningSlopes(int64_t n) {
  int64_t p = 1;
  while (2 * p <= n) p *= 2;
  std::vector<double> slopes;
  for (int64_t h = 0; h < n; ++h) {
    const double exponent =
        h < p ? -8.0 * static_cast<double>(h + 1) / static_cast<double>(p)
              : -4.0 * static_cast<double>(2 * (h - p) + 1) / static_cast<double>(p);
    slopes.push_back(static_cast<float>(std::exp2(exponent)));
  }
  return slopes;
}

// q, k, v [n, N, D]; states [N, D, D] (key x value).
struct LightningShape {
  int64_t n = 0;
  int64_t heads = 1;
  int64_t d = 1;
  double scale = 1.0;
  std::vector<double> slopes;

  size_t Row(int64_t t, int64_t h) const { return static_cast<size_t>((t * heads + h) * d); }
  size_t State(int64_t h) const { return static_cast<size_t>(h * d * d); }
  double Decay(int64_t h) const { return std::exp(-slopes[static_cast<size_t>(h)]); }
};

template <typename Number>
struct LightningResult {
  std::vector<Number> out;
  std::vector<Number> state_out;
};

// S = lambda S + k v^T, then o = scale S^T q. `state_in` may be empty: zero.
template <typename Number>
LightningResult<Number> LightningForward(const LightningShape& shape, const std::vector<Number>& q,
                                         const std::vector<Number>& k, const std::vector<Number>& v,
                                         const std::vector<Number>& state_in) {
  const int64_t d = shape.d;
  LightningResult<Number> result;
  result.out.resize(q.size());
  result.state_out = state_in;
  result.state_out.resize(static_cast<size_t>(shape.heads * d * d));
  for (int64_t h = 0; h < shape.heads; ++h) {
    Number* state = result.state_out.data() + shape.State(h);
    for (int64_t t = 0; t < shape.n; ++t) {
      const size_t row = shape.Row(t, h);
      for (int64_t a = 0; a < d; ++a) {
        for (int64_t b = 0; b < d; ++b) {
          Number& s = state[a * d + b];
          s = shape.Decay(h) * s +
              k[row + static_cast<size_t>(a)] * v[row + static_cast<size_t>(b)];
          result.out[row + static_cast<size_t>(b)] +=
              shape.scale * q[row + static_cast<size_t>(a)] * s;
        }
      }
    }
  }
  return result;
}

struct LightningGradients {
  std::vector<double> dq, dk, dv, dstate_in;
};

// With R = dL/dS, from the last token to the first: R += scale q do^T; dq = scale S do, dk = R v,
// dv = R^T k; R = lambda R.
inline LightningGradients LightningBackward(
    const LightningShape& shape, const std::vector<double>& q, const std::vector<double>& k,
    const std::vector<double>& v, const std::vector<double>& dout,
    const std::vector<double>& state_in, const std::vector<double>& dstate_out) {
  const auto d = static_cast<size_t>(shape.d);
  LightningGradients grad = {std::vector<double>(q.size()), std::vector<double>(q.size()),
                             std::vector<double>(q.size()), dstate_out};
  grad.dstate_in.resize(static_cast<size_t>(shape.heads) * d * d);
  for (int64_t h = 0; h < shape.heads; ++h) {
    std::vector<double> state(d * d);
    if (!state_in.empty()) {
      std::copy_n(state_in.begin() + static_cast<int64_t>(shape.State(h)), d * d, state.begin());
    }
    for (int64_t t = 0; t < shape.n; ++t) {
      const size_t row = shape.Row(t, h);
      for (size_t a = 0; a < d; ++a) {
        for (size_t b = 0; b < d; ++b) {
          double& s = state[a * d + b];
          s = shape.Decay(h) * s + k[row + a] * v[row + b];
          grad.dq[row + a] += shape.scale * s * dout[row + b];
        }
      }
    }
    double* r = grad.dstate_in.data() + shape.State(h);
    for (int64_t t = shape.n - 1; t >= 0; --t) {
      const size_t row = shape.Row(t, h);
      for (size_t a = 0; a < d; ++a) {
        for (size_t b = 0; b < d; ++b) {
          double& s = r[a * d + b];
          s += shape.scale * q[row + a] * dout[row + b];
          grad.dk[row + a] += s * v[row + b];
          grad.dv[row + b] += s * k[row + a];
          s *= shape.Decay(h);
        }
      }
    }
  }
  return grad;
}

}  // namespace sala::kernels::reference
