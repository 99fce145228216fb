// What a call of generalised advantage estimation brings along, on any device.
#pragma once
#include <cstdint>

namespace fastalign {

// [rows, length] each, dense, of one type. See gae_eager.py for the recursion.
template <class T>
struct GaeArgs {
    const T *rewards, *values;
    const bool* mask;
    T *advantages, *returns;
    int64_t rows, length;
    T gamma, gamma_lam;
    int threads;
};

}  // namespace fastalign
