// Wrappers of the instructions that have no CUDA C++ form. Their host twins, of the same names, are in the tests' shim.
// All need sm_80.
#pragma once

#include "common.cuh"

#ifndef EDGESTILL_HOST

__device__ __forceinline__ uint32 shared_address(const void* at) {
    return static_cast<uint32>(__cvta_generic_to_shared(at));
}

/// Four 8x8 matrices of 16-bit elements from shared memory. Lane 8 i + r names row r of matrix i, 16 aligned bytes;
/// lane 4 g + q gets elements 2 q and 2 q + 1 of row g of matrix i in to[i].
__device__ __forceinline__ void ldmatrix_x4(uint32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// `ldmatrix_x4` of the transposed matrices.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32 (&to)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// d += a b for a (16, 16), b (16, 8) of the type of the tag, d (16, 8) in float32. Lane 4 g + q holds, with k = 2 q:
/// a[0..3] rows g, g + 8, g, g + 8 at columns k, k, k + 8, k + 8; b[0..1] column g at rows k, k + 8; each and its next.
/// d[0..1] row g, columns k and k + 1; d[2..3] the same of row g + 8.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], __half) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2], __nv_bfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Start to copy 16 (or 4) aligned bytes from global to shared memory; if not `inside`, zeros, and nothing is read.
/// This thread has them after `copy_async_wait`, the block after a barrier behind that.
template <int kBytes> __device__ __forceinline__ void copy_async(void* shared, const void* global, bool inside) {
    static_assert(kBytes == 16 || kBytes == 4, "16 bytes past L1, or 4 through it");
    const uint32 to = shared_address(shared), bytes = inside ? kBytes : 0;
    if constexpr (kBytes == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

/// Until all copies that this thread started are done.
__device__ __forceinline__ void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif
