// Attention of ranges of queries on the device: a range of a case with its tensors. q and the other
// tensors of queries have rows of the range alone; k, v and their gradients those of all tokens.
#pragma once

#include <vector>

#include "tests/kernels/attention/attention_cuda_case.h"
#include "tests/kernels/attention/attention_ranges.h"

namespace sala::kernels {

class DeviceRange {
 public:
  // `gradients`: the number type of dk and dv.
  DeviceRange(const AttentionCase& part, DType gradients)
      : heads_(part.heads),
        q_(DType::kBF16, part.q, 8),
        k_(DType::kBF16, part.k, 16),
        v_(DType::kBF16, part.v, 8),
        dout_(DType::kBF16, part.dout, 16),
        out_(DType::kBF16, part.q.rows(), part.q.columns(), 8),
        lse_(DType::kF32, part.q.rows(), part.heads.query),
        dq_(DType::kBF16, part.q.rows(), part.q.columns(), 24),
        dk_(gradients, part.t, part.k.columns(), 8),
        dv_(gradients, part.t, part.k.columns(), 16) {}

  Tensor q() const { return q_.heads(heads_.query, heads_.d); }
  Tensor k() const { return k_.heads(heads_.kv, heads_.d); }
  Tensor v() const { return v_.heads(heads_.kv, heads_.d); }
  Tensor dout() const { return dout_.heads(heads_.query, heads_.d); }
  Tensor out() const { return out_.heads(heads_.query, heads_.d); }
  Tensor lse() const { return lse_.tensor(); }
  Tensor dq() const { return dq_.heads(heads_.query, heads_.d); }
  Tensor dk() const { return dk_.heads(heads_.kv, heads_.d); }
  Tensor dv() const { return dv_.heads(heads_.kv, heads_.d); }

  void Download(AttentionCase& part) const {
    part.out = out_.Download();
    part.lse = lse_.Download();
    part.dq = dq_.Download();
    part.dk = dk_.Download();
    part.dv = dv_.Download();
    for (const DeviceMatrix* x : {&out_, &lse_, &dq_, &dk_, &dv_}) {
      EXPECT_TRUE(x->GapsUntouched());
    }
  }

 private:
  HeadCounts heads_;
  DeviceMatrix q_, k_, v_, dout_, out_, lse_, dq_, dk_, dv_;
};

// dk and dv of one call in bfloat16 are those in float32, rounded.
inline void ExpectRounded(const AttentionCase& bf16, const AttentionCase& f32) {
  for (const auto& [half, full] : {std::pair{&bf16.dk, &f32.dk}, {&bf16.dv, &f32.dv}}) {
    for (int64_t t = 0; t < half->rows(); ++t) {
      for (int64_t i = 0; i < half->columns(); ++i) {
        if (std::isnan(half->at(t, i)) && std::isnan(full->at(t, i))) continue;
        ASSERT_EQ(half->at(t, i), static_cast<float>(BF16(full->at(t, i)))) << t << ", " << i;
      }
    }
  }
}

// dk and dv of the given tokens are zero.
inline void ExpectNoKeyGradients(const AttentionCase& part,
                                 const std::vector<DocumentRange>& documents) {
  for (const DocumentRange& document : documents) {
    for (const Matrix* x : {&part.dk, &part.dv}) {
      for (int64_t t = document.begin; t < document.end; ++t) {
        for (int64_t i = 0; i < x->columns(); ++i) ASSERT_EQ(x->at(t, i), 0.0F) << t;
      }
    }
  }
}

}  // namespace sala::kernels
