// The choice of a kernel by dtype, which the CPU kernels share.
#pragma once

#include <ATen/core/Tensor.h>

namespace {

// body<T>() with the C++ type of the values of x; `purpose` is what an error says there is none of for another dtype.
template <class Body>
void with_dtype(const at::Tensor& x, const char* purpose, const Body& body) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return body.template operator()<float>();
    case at::kHalf:
      return body.template operator()<at::Half>();
    case at::kBFloat16:
      return body.template operator()<at::BFloat16>();
    default:
      TORCH_CHECK(false, "no ", purpose, " ", x.scalar_type());
  }
}

}  // namespace
