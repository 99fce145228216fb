// A stand-in for the CUDA runtime: launches go to a callback instead of a device. Linked with the real launch code, it
// shows on a machine without a GPU what that code would do, down to each kernel's arguments.
#include <cstddef>
#include <cstring>
#include <map>
#include <string>

#include <cuda_runtime_api.h>

namespace {

using Callback = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, unsigned cluster,
                         std::size_t shared, void** arguments);

Callback callback = nullptr;
int devices = 1, device = 0, capability = 9, most_shared = 232448, next_error = 0;
std::map<const void*, std::string>& names() {
    static std::map<const void*, std::string> all;
    return all;
}

}  // namespace

extern "C" {

void recorder_setup(Callback to, int major, int shared) { callback = to, capability = major, most_shared = shared; }
void recorder_fail_next(int error) { next_error = error; }
int recorder_device() { return device; }

void** __cudaRegisterFatBinary(void*) {
    static void* handle = nullptr;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
    names()[host] = name;
}
unsigned __cudaPopCallConfiguration(dim3*, dim3*, std::size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, std::size_t, cudaStream_t) {
    return cudaErrorNotSupported;
}

cudaError_t cudaGetDevice(int* to) {
    *to = device;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int to) {
    if (to < 0 || to >= devices) return cudaErrorInvalidDevice;
    device = to;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
    *value = which == cudaDevAttrComputeCapabilityMajor ? capability : most_shared;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
    return value <= most_shared ? cudaSuccess : cudaErrorInvalidValue;
}
const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorLaunchFailure";
}
const char* cudaGetErrorString(cudaError_t) { return "the stand-in says so"; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void** arguments) {
    if (next_error) {
        const int error = next_error;
        next_error = 0;
        return static_cast<cudaError_t>(error);
    }
    const unsigned grid[3] = {config->gridDim.x, config->gridDim.y, config->gridDim.z};
    const unsigned block[3] = {config->blockDim.x, config->blockDim.y, config->blockDim.z};
    const unsigned cluster = config->numAttrs ? config->attrs[0].val.clusterDim.x : 1;
    const int error = callback(names()[host].c_str(), grid, block, cluster, config->dynamicSmemBytes, arguments);
    return static_cast<cudaError_t>(error);
}

}  // extern "C"
