// tau^2 KL(teacher || student) on logits by plain loops; contiguous [tokens, vocabulary]. Uses
// LogSoftmax of the cross entropy's reference.
#pragma once

#include <vector>

#include "kernels/cross_entropy/reference.h"

namespace sala::kernels::reference {

template <typename T>
T KlDivergenceForward(int64_t tokens, int64_t vocabulary, double tau, const double* teacher,
                      const T* student) {
  T loss = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> a(teacher + t * vocabulary, teacher + (t + 1) * vocabulary);
    std::vector<T> b(student + t * vocabulary, student + (t + 1) * vocabulary);
    for (double& x : a) x /= tau;
    for (T& x : b) x /= tau;
    const std::vector<double> log_p = LogSoftmax(vocabulary, a.data());
    const std::vector<T> log_q = LogSoftmax(vocabulary, b.data());
    for (size_t v = 0; v < log_p.size(); ++v) {
      loss += tau * tau * std::exp(log_p[v]) * (log_p[v] - log_q[v]);
    }
  }
  return loss;
}

// dstudent = grad_scale tau (q - p), overwritten.
inline void KlDivergenceBackward(int64_t tokens, int64_t vocabulary, double tau, double grad_scale,
                                 const double* teacher, const double* student, double* dstudent) {
  for (int64_t t = 0; t < tokens; ++t) {
    std::vector<double> a(teacher + t * vocabulary, teacher + (t + 1) * vocabulary);
    std::vector<double> b(student + t * vocabulary, student + (t + 1) * vocabulary);
    for (double& x : a) x /= tau;
    for (double& x : b) x /= tau;
    const std::vector<double> log_p = LogSoftmax(vocabulary, a.data());
    const std::vector<double> log_q = LogSoftmax(vocabulary, b.data());
    for (size_t v = 0; v < log_p.size(); ++v) {
      dstudent[static_cast<size_t>(t * vocabulary) + v] =
          grad_scale * tau * (std::exp(log_q[v]) - std::exp(log_p[v]));
    }
  }
}

}  // namespace sala::kernels::reference
