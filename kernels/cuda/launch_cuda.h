// Launching from C++: the caller's device and stream, clusters, and errors as exceptions.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "token_stats_cuda.h"

namespace fastalign::cuda {

inline void check(cudaError_t error, const char* kernel, const Place& place) {
    if (error == cudaSuccess) return;
    throw std::runtime_error(std::string(kernel) + " on cuda:" + std::to_string(place.device) + ": " +
                             cudaGetErrorName(error) + " (" + cudaGetErrorString(error) + ")");
}

// The caller's device, for as long as this lives.
class OnDevice {
  public:
    OnDevice(const char* kernel, const Place& place) {
        check(cudaGetDevice(&before_), kernel, place);
        if (before_ == place.device) before_ = -1;
        else check(cudaSetDevice(place.device), kernel, place);
    }
    ~OnDevice() {
        if (before_ >= 0) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    int before_ = -1;
};

struct Shape {
    int64_t blocks;
    int threads;
    int64_t shared = 0;
    int cluster = 1;
};

// Blocks beyond what a grid can hold are a loop within the kernel.
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

template <class... Args>
void launch(const char* name, void (*kernel)(Args...), const Shape& shape, const Place& place, const Args&... args) {
    if (shape.shared > 0) {
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shape.shared)),
              name, place);
    }
    cudaLaunchConfig_t config{};
    const int64_t most = kMaxBlocks / shape.cluster * shape.cluster;
    config.gridDim = dim3(static_cast<unsigned>(shape.blocks < most ? shape.blocks : most));
    config.blockDim = dim3(shape.threads);
    config.dynamicSmemBytes = shape.shared;
    config.stream = static_cast<cudaStream_t>(place.stream);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = shape.cluster > 1 ? 1 : 0;
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
    check(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), pointers), name, place);
}

}  // namespace fastalign::cuda
