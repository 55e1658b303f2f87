// The weights of pixels, which the squared-error losses share.
#pragma once

#include "common.cuh"

constexpr int kWeightBlocks = WEIGHT_BLOCKS;  // partial sums of a level's weights, by `weight_sums` of weighted_mse
constexpr float kWeightEps = static_cast<float>(WEIGHT_EPS);

/// 1 / (channels * sum of a level's weights + kWeightEps), the same in all threads. `scratch` as in `grid_total`.
__device__ __forceinline__ float weighted_norm(const float* partials, uint32 channels, float* scratch) {
    float sum[1] = {0.0f};
    for (int i = threadIdx.x; i < kWeightBlocks; i += blockDim.x) sum[0] += __ldg(partials + i);
    block_reduce<Sum>(sum, scratch);
    return 1.0f / (static_cast<float>(channels) * sum[0] + kWeightEps);
}
