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

// In assembly, or the compiler may take it apart beside narrower stores.
__device__ inline void store_pack(void* p, const Pack& v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.w[0]),
                 "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
                 : "memory");
}

// Vectors 0, 32, 64, .. from p, each if its number (index, index + 32, ..) is below `count`; -inf for the others. The
// condition is the load's own, or each vector would have a branch.
template <class T, int kCount, int kDone = 0>
__device__ inline void load_packs_below(Pack (&v)[kCount], const void* p, unsigned index, unsigned count) {
    if constexpr (kDone < kCount) {
        v[kDone] = minus_infinity(Words<T>::kMinusInf);
        asm volatile(
            "{.reg .pred inside;\n setp.lt.u32 inside, %5, %6;\n"
            " @inside ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4 + %7];}"
            : "+r"(v[kDone].w[0]), "+r"(v[kDone].w[1]), "+r"(v[kDone].w[2]), "+r"(v[kDone].w[3])
            : "l"(p), "r"(index + 32 * kDone), "r"(count), "n"(kDone * 32 * kBytes));
        load_packs_below<T, kCount, kDone + 1>(v, p, index, count);
    }
}

// The bits of element i of p, or those of -inf where it is outside [0, count).
template <class T>
__device__ inline uint32_t element_bits(const T* p, int i, int count) {
    using Bits = typename Words<T>::Bits;
    const bool inside = static_cast<unsigned>(i) < static_cast<unsigned>(count);
    return inside ? reinterpret_cast<const Bits*>(p)[i] : static_cast<Bits>(Words<T>::kMinusInf);
}

// Cuts each vector at byte `shift` from what lies at its place and the vector after it, which the next lane has; that
// of lane 31 is the next 32 vectors' first, which lane 0 has, and after all of them `last`.
template <int kCount>
__device__ inline void shift_down(Pack (&v)[kCount], int shift, const Pack& last) {
    const int lane = threadIdx.x % 32;
    Pack whole[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) whole[u] = v[u];
    cut(v, shift, [&](int u, int i) {
        const uint32_t first = u + 1 < kCount ? whole[u + 1 < kCount ? u + 1 : u].w[i] : last.w[i];
        return __shfl_sync(kAllLanes, lane == 0 ? first : whole[u].w[i], (lane + 1) % 32);
    });
}

// A row, or the rest of one, in global memory: `length` elements from `base`.
template <class T>
struct Source {
    const T* base;
    const char* aligned;  // the multiple of 16 bytes at or before base
    int shift;            // bytes between the two
    int length;
    int over, whole;  // aligned vectors that begin before the row; that end within it
    bool ragged;      // the row begins or ends within a vector

    __device__ Source(const T* p, int n)
        : base(p),
          aligned(reinterpret_cast<const char*>(p) - (reinterpret_cast<uintptr_t>(p) & 15)),
          shift(static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15)),
          length(n),
          over(shift ? 1 : 0) {
        const unsigned end = static_cast<unsigned>(n) + static_cast<unsigned>(shift) / sizeof(T);
        whole = static_cast<int>(end / kWidth<T>);
        ragged = shift != 0 || end % kWidth<T> != 0;
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
        Pack last{};
        if (lane == 0) last = load_pack<kCount * 32 * kBytes>(p);
        shift_down(v, shift, last);
    }

    // The same vectors at a row's edge; beyond its end there is -inf.
    template <int kCount>
    __device__ void load_edge(Pack (&v)[kCount], int first) const {
        const int lane = threadIdx.x % 32;
        const char* p = aligned + static_cast<int64_t>(first + lane) * kBytes;
        const int inside = whole > over ? whole - over : 0;
        load_packs_below<T>(v, p, first + lane - over, inside);
        if (!ragged) return;
        Pack last[1];
        load_packs_below<T>(last, p + kCount * 32 * kBytes, lane == 0 ? first + kCount * 32 - over : inside, inside);
        add_ends(v, last[0], first);
        if (shift) shift_down(v, shift, last[0]);
    }

  private:
    // The vectors that the row begins and ends in, of which not all is the row's: a lane brings each element, and the
    // lane that holds the vector (or lane 0, of the one after v) takes it.
    template <int kCount>
    __device__ void add_ends(Pack (&v)[kCount], Pack& last, int first) const {
        constexpr int kW = kWidth<T>;
        const int lane = threadIdx.x % 32, end = whole - first;
        const bool head = over && first == 0, tail = static_cast<unsigned>(end) <= kCount * 32;
        const bool wanted = lane < kW ? head : lane < 2 * kW && tail;
        const int i = lane - shift / static_cast<int>(sizeof(T)) + (lane < kW ? 0 : (whole - 1) * kW);
        const uint32_t bits = element_bits(base, i, wanted ? length : 0);
        if (head) {
            const Pack vector = vector_of_lanes<T>(bits, 0);
            if (lane == 0) v[0] = vector;
        }
        if (!tail) return;
        const Pack vector = vector_of_lanes<T>(bits, kW);
#pragma unroll
        for (int u = 0; u < kCount; ++u)
            if (end - 32 * u == lane) v[u] = vector;
        if (end == kCount * 32) last = vector;
    }
};

// ------------------------------------------------------------------------------------------------- shared memory
__device__ inline void copy_async_below(unsigned shared, const void* global, int index, int count) {
    asm volatile(
        "{.reg .pred inside;\n setp.lt.s32 inside, %2, %3;\n @inside cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(
            shared),
        "l"(global), "r"(index), "r"(count)
        : "memory");
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

// As load_packs_below.
template <class T, int kOffset, int kCount, int kDone = 0>
__device__ inline void load_shared_below(Pack (&v)[kCount], unsigned address, int index, int count) {
    if constexpr (kDone < kCount) {
        v[kDone] = minus_infinity(Words<T>::kMinusInf);
        asm volatile(
            "{.reg .pred inside;\n setp.lt.s32 inside, %5, %6;\n"
            " @inside ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %7];}"
            : "+r"(v[kDone].w[0]), "+r"(v[kDone].w[1]), "+r"(v[kDone].w[2]), "+r"(v[kDone].w[3])
            : "r"(address), "r"(index + 32 * kDone), "r"(count), "n"(kOffset + kDone * 32 * kBytes)
            : "memory");
        load_shared_below<T, kOffset, kCount, kDone + 1>(v, address, index, count);
    }
}

// A part of a row in shared memory: `length` elements from byte `offset` of `memory`, -inf around them.
template <class T>
struct Staged {
    const char* memory;
    int offset, length;

    __device__ Staged(const char* memory, int offset, int length) : memory(memory), offset(offset), length(length) {}

    // Starts to copy [p, p + count) to `memory`. Complete for the team after wait_for_copies and a barrier.
    template <class Team>
    static __device__ Staged copy(char* memory, const T* p, int count) {
        const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(p) & 15);
        const char* aligned = reinterpret_cast<const char*>(p) - shift;
        const unsigned skew = static_cast<unsigned>(shift) / sizeof(T);
        const int whole = static_cast<int>((static_cast<unsigned>(count) + skew) / kWidth<T>);
        const int first = Team::thread() + (shift ? 1 : 0), step = Team::threads() * kBytes;
        unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(memory)) + first * kBytes;
        const char* from = aligned + static_cast<int64_t>(first) * kBytes;
        for (int i = first; i < whole; i += 4 * Team::threads(), to += 4 * step, from += 4 * step)
#pragma unroll
            for (int u = 0; u < 4; ++u)
                copy_async_below(to + u * step, from + u * step, i + u * Team::threads(), whole);
        if (shift == 0 && (static_cast<unsigned>(count) + skew) % kWidth<T> == 0) return {memory, shift, count};
        // By single elements: the vector that the part begins in, the one that it ends in, and one more for what is cut
        // from that.
        using Bits = typename Words<T>::Bits;
        constexpr int kW = kWidth<T>;
        const int thread = Team::thread(), place = thread < kW ? thread : (whole - 1) * kW + thread;
        if (thread < 3 * kW && (shift || thread >= kW))
            reinterpret_cast<Bits*>(memory)[place] =
                static_cast<Bits>(element_bits(p, place - static_cast<int>(skew), count));
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

    // Beyond the end there is -inf.
    template <int kCount>
    __device__ void load_edge(Pack (&v)[kCount], int first) const {
        const int index = first + static_cast<int>(threadIdx.x % 32), held = vectors_of<T>(length);
        const int shift = offset & 15;
        const unsigned p = address(index);
        load_shared_below<T, 0>(v, p, index, held);
        if (shift == 0) return;
        Pack next[kCount];
        load_shared_below<T, kBytes>(next, p, index, held);
        cut(v, shift, [&](int u, int i) { return next[u].w[i]; });
    }
};

}  // namespace fastalign::cuda
