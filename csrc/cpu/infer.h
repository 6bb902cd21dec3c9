// The inference operators on the CPU and the packing of their weights, as csrc/schemas.cpp declares them.
#pragma once

#include "../boundary.h"

namespace mnv2 {

Tensor pack_block_op(const OptionalTensor& expand_weight, const OptionalTensor& expand_bias,
                     const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& project_weight,
                     const Tensor& project_bias, ScalarType dtype);
Tensor pack_dense_op(const Tensor& weight, const Tensor& bias, ScalarType dtype);
Tensor pack_head_op(const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& classifier_weight,
                    const Tensor& classifier_bias, ScalarType dtype);
Tensor pack_network(const std::vector<Tensor>& packed);

Tensor inverted_residual(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& block,
                         const std::vector<double>& bounds, bool tf32);
Tensor dense(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& dense,
             const std::vector<double>& bounds, bool tf32, const OptionalTensor& image_bias);
Tensor head(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& head, const std::vector<double>& bounds,
            bool tf32);
std::vector<Tensor> network(const Tensor& x, const Tensor& packed, const std::string& units, const std::string& bounds,
                            bool tf32);

}  // namespace mnv2
