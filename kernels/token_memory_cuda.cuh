// Rows of logits in memory, read in 16-byte vectors whatever their alignment: from global memory, or from shared
// memory where a block has staged its part.
//
// Vector j of a row holds its elements [j * kWidth, (j + 1) * kWidth), wherever the row starts in memory: which thread
// adds what does not depend on the row's address, so a token's numbers do not depend on its neighbours. Where a row
// does not start at a multiple of 16 bytes, a vector is cut from the two aligned ones that it straddles.
#pragma once
#include "token_vectors_cuda.cuh"

namespace fastalign::cuda {

// Read once: no use for the first cache. Not through the read-only path, as the gradient may go over the logits.
template <int kOffset = 0>
__device__ inline Pack load_pack(const void* p) {
    Pack v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "l"(p), "n"(kOffset));
    return v;
}

// Vectors 0, 32, 64, .. from p.
template <int kCount, int kDone = 0>
__device__ inline void load_packs(Pack (&v)[kCount], const void* p) {
    if constexpr (kDone < kCount) {
        v[kDone] = load_pack<kDone * 32 * kBytes>(p);
        load_packs<kCount, kDone + 1>(v, p);
    }
}

__device__ inline void store_pack(void* p, const Pack& v) {
    *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}

// Elements [at, at + kWidth) one by one; -inf for those outside [0, count).
template <class T>
__device__ inline Pack gather(const T* p, int at, int count) {
    using Bits = typename Words<T>::Bits;
    constexpr int kPerWord = Words<T>::kPerWord;
    Pack v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v.w[i] = 0;
#pragma unroll
        for (int h = 0; h < kPerWord; ++h) {
            const int e = at + i * kPerWord + h;
            const Bits bits =
                e >= 0 && e < count ? reinterpret_cast<const Bits*>(p)[e] : static_cast<Bits>(Words<T>::kMinusInf);
            v.w[i] |= static_cast<uint32_t>(bits) << (h * 16);
        }
    }
    return v;
}

// A row, or the rest of one, in global memory: `length` elements from `base`.
template <class T>
struct Source {
    const T* base;
    const char* aligned;  // the multiple of 16 bytes at or before base
    int shift;            // bytes between the two
    int length;
    int over, whole;  // aligned vectors that begin before the row; that end within it

    __device__ Source(const T* p, int n)
        : base(p),
          aligned(reinterpret_cast<const char*>(p) - (reinterpret_cast<uintptr_t>(p) & 15)),
          shift(static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15)),
          length(n),
          over(shift ? 1 : 0),
          whole(static_cast<int>((static_cast<int64_t>(n) * static_cast<int>(sizeof(T)) + shift) / kBytes)) {
        asm("" : "+l"(aligned), "+r"(shift), "+r"(over), "+r"(whole));  // or the compiler finds them anew in each tile
    }

    __device__ Source part(int begin, int count) const { return {base + begin, count}; }
    __device__ float at(int i) const { return Words<T>::load(base + i); }

    // Vectors before this one are whole vectors of memory, or cut from two; but vector 0 is not, where `cut_at_start`.
    __device__ int end() const { return whole - over; }
    __device__ bool cut_at_start() const { return over > 0; }

    // Vectors first + 32 u + lane, all inside. Called by whole warps.
    template <int kCount>
    __device__ void load(Pack (&v)[kCount], int first) const {
        const int lane = threadIdx.x % 32;
        const char* p = aligned + static_cast<int64_t>(first + lane) * kBytes;
        load_packs(v, p);
        if (shift == 0) return;
        // The neighbour of lane 31 is the next 32 vectors' first, which lane 0 holds.
        Pack last{};
        if (lane == 0) last = load_pack<kCount * 32 * kBytes>(p);
        Pack whole[kCount];
#pragma unroll
        for (int u = 0; u < kCount; ++u) whole[u] = v[u];
        cut(v, shift, [&](int u, int i) {
            const uint32_t first = u + 1 < kCount ? whole[u + 1 < kCount ? u + 1 : u].w[i] : last.w[i];
            return __shfl_sync(kAllLanes, lane == 0 ? first : whole[u].w[i], (lane + 1) % 32);
        });
    }

    // The same vectors at a row's edge; beyond its end there is -inf.
    template <int kCount>
    __device__ void load_edge(Pack (&v)[kCount], int first) const {
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
            const int at = (first + 32 * u + static_cast<int>(threadIdx.x % 32)) * kWidth<T>;
            v[u] = shift == 0 && at + kWidth<T> <= length ? load_pack(base + at) : gather(base, at, length);
        }
    }
};

// ------------------------------------------------------------------------------------------------- shared memory
__device__ inline void copy_async(unsigned shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Bytes of shared memory that any `count` elements need: their aligned vectors and one more to cut from.
FA_HD int64_t staged_bytes(int64_t count, int size) { return (count * size + 15) / 16 * 16 + 2 * 16; }

// Volatile, or the compiler takes apart what it needs only a part of, and single words 16 bytes apart share their
// banks.
template <int kOffset = 0>
__device__ inline Pack load_shared(unsigned address) {
    Pack v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
                 : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
                 : "r"(address), "n"(kOffset)
                 : "memory");
    return v;
}

// Vectors 0, 32, 64, .. from the address.
template <int kOffset, int kCount, int kDone = 0>
__device__ inline void load_shared(Pack (&v)[kCount], unsigned address) {
    if constexpr (kDone < kCount) {
        v[kDone] = load_shared<kOffset + kDone * 32 * kBytes>(address);
        load_shared<kOffset, kCount, kDone + 1>(v, address);
    }
}

// A part of a row in shared memory: `length` elements from byte `offset` of `memory`, -inf around them.
template <class T>
struct Staged {
    const char* memory;
    int offset, length;

    __device__ Staged(const char* memory, int offset, int length) : memory(memory), offset(offset), length(length) {}

    // Starts to copy [p, p + count) to `memory`. Complete for the block after wait_for_copies and a barrier.
    static __device__ Staged copy(char* memory, const T* p, int count) {
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15);
        const char* aligned = reinterpret_cast<const char*>(p) - shift;
        const int bytes = shift + count * static_cast<int>(sizeof(T)), whole = bytes / kBytes;
        const auto edge = [&](int i) {
            store_pack(memory + i * kBytes, gather(p, (i * kBytes - shift) / static_cast<int>(sizeof(T)), count));
        };
        const int first = threadIdx.x + (shift ? 1 : 0), step = blockDim.x * kBytes;
        unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(memory)) + first * kBytes;
        const char* from = aligned + static_cast<int64_t>(first) * kBytes;
#pragma unroll 4
        for (int i = first; i < whole; i += blockDim.x, to += step, from += step) copy_async(to, from);
        // The vectors that begin or end outside, and one more for what is cut from the last.
        if (threadIdx.x == 0 && shift) edge(0);
        if (threadIdx.x == blockDim.x - 1 && (whole > 0 || !shift)) edge(whole);
        if (threadIdx.x == 1) store_pack(memory + (whole + 1) * kBytes, minus_infinity(Words<T>::kMinusInf));
        return {memory, shift, count};
    }

    __device__ Staged part(int begin, int count) const {
        return {memory, offset + begin * static_cast<int>(sizeof(T)), count};
    }
    __device__ float at(int i) const { return Words<T>::load(reinterpret_cast<const T*>(memory + offset) + i); }

    __device__ int end() const { return static_cast<int>(static_cast<unsigned>(length) / kWidth<T>); }
    __device__ bool cut_at_start() const { return false; }

    __device__ unsigned address(int vector) const {
        return static_cast<unsigned>(__cvta_generic_to_shared(memory)) + (offset & ~15) + vector * kBytes;
    }

    template <int kCount>
    __device__ void load(Pack (&v)[kCount], int first) const {
        const unsigned p = address(first + static_cast<int>(threadIdx.x % 32));
        load_shared<0>(v, p);
        const int shift = offset & 15;
        if (shift == 0) return;
        Pack next[kCount];
        load_shared<kBytes>(next, p);
        cut(v, shift, [&](int u, int i) { return next[u].w[i]; });
    }

    template <int kCount>
    __device__ void load_edge(Pack (&v)[kCount], int first) const {
        const int held = vectors_of<T>(length);
#pragma unroll
        for (int u = 0; u < kCount; ++u) {
            // Beyond the end the last vector is read, and -inf put in its place.
            const int index = first + 32 * u + static_cast<int>(threadIdx.x % 32);
            const unsigned p = address(index < held ? index : held - 1);
            Pack one[1] = {load_shared(p)};
            const Pack next = load_shared<kBytes>(p);
            cut(one, offset & 15, [&](int, int i) { return next.w[i]; });
            v[u] = index < held ? one[0] : minus_infinity(Words<T>::kMinusInf);
        }
    }
};

}  // namespace fastalign::cuda
