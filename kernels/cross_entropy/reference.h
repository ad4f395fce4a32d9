// Output head and softmax losses by plain loops; contiguous arrays.
#pragma once

#include <cmath>
#include <complex>
#include <cstdint>
#include <vector>

namespace sala::kernels::reference {

// scale * hidden W^T, [tokens, vocabulary]
template <typename T>
std::vector<T> Logits(int64_t tokens, int64_t width, int64_t vocabulary, double scale,
                      const T* hidden, const T* weight) {
  std::vector<T> logits(static_cast<size_t>(tokens * vocabulary));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t v = 0; v < vocabulary; ++v) {
      T sum = 0;
      for (int64_t i = 0; i < width; ++i) sum += hidden[t * width + i] * weight[v * width + i];
      logits[static_cast<size_t>(t * vocabulary + v)] = scale * sum;
    }
  }
  return logits;
}

// log softmax of one row
template <typename T>
std::vector<T> LogSoftmax(int64_t n, const T* x) {
  using std::exp;
  using std::log;
  double largest = std::real(x[0]);
  for (int64_t i = 1; i < n; ++i) largest = std::max(largest, std::real(x[i]));
  T sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += exp(x[i] - largest);
  std::vector<T> y(x, x + n);
  for (T& value : y) value -= largest + log(sum);
  return y;
}

// Adds to dhidden and dweight what the gradient dlogits (of scale * hidden W^T) gives.
inline void HeadBackward(int64_t tokens, int64_t width, int64_t vocabulary, double scale,
                         const double* dlogits, const double* hidden, const double* weight,
                         double* dhidden, double* dweight) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t v = 0; v < vocabulary; ++v) {
      const double d = scale * dlogits[t * vocabulary + v];
      for (int64_t i = 0; i < width; ++i) {
        dhidden[t * width + i] += d * weight[v * width + i];
        dweight[v * width + i] += d * hidden[t * width + i];
      }
    }
  }
}

// Summed over the labels that are not negative.
template <typename T>
T CrossEntropyOfLogits(int64_t tokens, int64_t vocabulary, const T* logits, const int32_t* labels) {
  T loss = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (labels[t] < 0) continue;
    loss -= LogSoftmax(vocabulary, logits + t * vocabulary)[static_cast<size_t>(labels[t])];
  }
  return loss;
}

template <typename T>
T CrossEntropyForward(int64_t tokens, int64_t width, int64_t vocabulary, double scale,
                      const T* hidden, const T* weight, const int32_t* labels) {
  const std::vector<T> logits = Logits(tokens, width, vocabulary, scale, hidden, weight);
  return CrossEntropyOfLogits(tokens, vocabulary, logits.data(), labels);
}

// Turns logits into the gradient of grad_scale * loss with respect to them.
inline void CrossEntropyLogitGradient(int64_t tokens, int64_t vocabulary, double grad_scale,
                                      const int32_t* labels, double* logits) {
  for (int64_t t = 0; t < tokens; ++t) {
    double* row = logits + t * vocabulary;
    const std::vector<double> log_p = LogSoftmax(vocabulary, row);
    for (int64_t v = 0; v < vocabulary; ++v) {
      const double onehot = v == labels[t] ? 1 : 0;
      row[v] = labels[t] < 0 ? 0 : grad_scale * (std::exp(log_p[static_cast<size_t>(v)]) - onehot);
    }
  }
}

// Gradient of grad_scale * loss; both outputs accumulate.
inline void CrossEntropyBackward(int64_t tokens, int64_t width, int64_t vocabulary, double scale,
                                 double grad_scale, const double* hidden, const double* weight,
                                 const int32_t* labels, double* dhidden, double* dweight) {
  std::vector<double> d = Logits(tokens, width, vocabulary, scale, hidden, weight);
  CrossEntropyLogitGradient(tokens, vocabulary, grad_scale, labels, d.data());
  HeadBackward(tokens, width, vocabulary, scale, d.data(), hidden, weight, dhidden, dweight);
}

}  // namespace sala::kernels::reference
