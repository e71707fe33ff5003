// What a cluster's blocks take to add up parts through each other's shared memory, and through global memory, while each
// multiprocessor has so many bytes on their way.
#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#define CHECK(x) do { cudaError_t e = (x); if (e != cudaSuccess) { printf("%s: %s\n", #x, cudaGetErrorString(e)); } } while (0)
__device__ __forceinline__ uint32_t sm(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void mb_init(uint32_t b, uint32_t n) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(b), "r"(n)); }
__device__ __forceinline__ void mb_expect(uint32_t b, uint32_t n) { asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1;}" :: "r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void mb_wait(uint32_t b, uint32_t parity) {
  asm volatile("{.reg .pred p; L: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1; @!p bra L;}" :: "r"(b), "r"(parity) : "memory");
}
__device__ __forceinline__ uint32_t mapa(uint32_t a, uint32_t r) { uint32_t d; asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(r)); return d; }
__device__ __forceinline__ void st_async(uint32_t a, float4 v, uint32_t b) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" :: "r"(a), "r"(__float_as_uint(v.x)), "r"(__float_as_uint(v.y)), "r"(__float_as_uint(v.z)), "r"(__float_as_uint(v.w)), "r"(b) : "memory");
}
__device__ __forceinline__ uint32_t clus() { uint32_t r; asm("mov.u32 %0, %%cluster_ctaid.x;" : "=r"(r)); return r; }
__device__ __forceinline__ unsigned long long now() { unsigned long long t; asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)); return t; }
// Warps 0..3: 128 threads with a part of four floats each of 512; warp 4 streams.
// mode 0: through the cluster's shared memory; 1: through global memory: parts, merging.
extern "C" __global__ void __launch_bounds__(512, 1) go(int mode, int C, int rounds, uint32_t flying, const char *weights, size_t bytes, float4 *parts, uint32_t *row, unsigned long long *out) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ __align__(16) uint64_t bar, wb[8];
  __shared__ volatile int done;
  float4 *inbox = (float4 *)(shared + 1024 * 160);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) { mb_init(sm(&bar), 1); for (int i = 0; i < 8; i++) mb_init(sm(&wb[i]), 1); done = 0; }
  asm volatile("fence.mbarrier_init.release.cluster;");
  __syncthreads();
  if (C > 1) { asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory"); }
  uint32_t rank = C > 1 ? clus() : blockIdx.x % 16, group = blockIdx.x / 16;
  if (warp == 4) {
    if (lane == 0 && flying) {
      uint32_t each = flying / 8; size_t at = (size_t)blockIdx.x * (bytes / gridDim.x); size_t end = at + bytes / gridDim.x; size_t from = at; unsigned long long n = 0;
      for (int i = 0; i < 8; i++) { mb_expect(sm(&wb[i]), each); asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(sm(shared) + i * each), "l"(weights + from), "r"(each), "r"(sm(&wb[i])) : "memory"); from += each; }
      uint32_t par = 0;
      while (!done) {
        for (int i = 0; i < 8; i++) { mb_wait(sm(&wb[i]), par); n += each; if (from + each > end) from = at; mb_expect(sm(&wb[i]), each); asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :: "r"(sm(shared) + i * each), "l"(weights + from), "r"(each), "r"(sm(&wb[i])) : "memory"); from += each; }
        par ^= 1;
      }
      for (int i = 0; i < 8; i++) mb_wait(sm(&wb[i]), par);
      out[2 + blockIdx.x] = n;
    }
  } else if (warp < 4) {
    int t = threadIdx.x; // element four t of 512
    unsigned long long begin = 0;
    for (int r = 1; r <= rounds; r++) {
      if (r == rounds / 4) begin = now();
      float4 v = make_float4(r, 1, 1, 1);
      if (mode == 0) {
        // Thread t's four elements go to block t / 8; sixteen sources each.
        if (t == 0) mb_expect(sm(&bar), 16 * 8 * 16);
        uint32_t to = t / 8;
        st_async(mapa(sm(inbox + rank * 8 + t % 8), to), v, mapa(sm(&bar), to));
        if (t < 32) {
          mb_wait(sm(&bar), (r - 1) & 1);
          float4 s = make_float4(0, 0, 0, 0);
          // Four lanes share the sources of one of eight fours.
          for (int k = t / 8; k < 16; k += 4) { float4 p = inbox[k * 8 + t % 8]; s.x += p.x; s.y += p.y; s.z += p.z; s.w += p.w; }
          for (int w = 8; w < 32; w *= 2) { s.x += __shfl_xor_sync(~0u, s.x, w); s.y += __shfl_xor_sync(~0u, s.y, w); s.z += __shfl_xor_sync(~0u, s.z, w); s.w += __shfl_xor_sync(~0u, s.w, w); }
          if (t < 8) { uint32_t *o = row + blockIdx.x * 32 + 4 * t; asm volatile("st.relaxed.gpu.v4.b32 [%0], {%1,%1,%1,%1};" :: "l"(o), "r"(r) : "memory"); }
        }
      } else {
        uint32_t *p = (uint32_t *)(parts + ((size_t)group * 16 + rank) * 128 + t);
        asm volatile("st.relaxed.gpu.v4.b32 [%0], {%1,%1,%1,%1};" :: "l"(p), "r"(r) : "memory");
        if (t < 32) {
          float s = 0; uint32_t a, b, c, d;
          for (;;) {
            bool ok = true;
            uint32_t w[4][4];
            for (int k = 0; k < 4; k++) { uint32_t *q = (uint32_t *)(parts + ((size_t)group * 16 + t / 8 * 4 + k) * 128 + rank * 8 + t % 8); asm volatile("ld.relaxed.gpu.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(w[k][0]), "=r"(w[k][1]), "=r"(w[k][2]), "=r"(w[k][3]) : "l"(q) : "memory"); }
            for (int k = 0; k < 4; k++) { ok &= w[k][0] == r; s += w[k][1]; }
            if (__all_sync(~0u, ok)) break;
          }
          for (int w = 8; w < 32; w *= 2) s += __shfl_xor_sync(~0u, s, w);
          if (t < 8 && s > -1) { uint32_t *o = row + blockIdx.x * 32 + 4 * t; asm volatile("st.relaxed.gpu.v4.b32 [%0], {%1,%1,%1,%1};" :: "l"(o), "r"(r) : "memory"); }
        }
      }
      // The row behind it: all read all of it, 128 blocks times 32 words.
      for (int k = 0; k < 8; k++) {
        uint32_t a, b, c, d; const uint32_t *q = row + (k * 128 + t) * 4;
        if (k * 128 + t < gridDim.x * 8) do { asm volatile("ld.relaxed.gpu.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(q) : "memory"); } while ((int)(a - r) < 0);
      }
      asm volatile("bar.sync 1, 128;" ::: "memory");
    }
    if (t == 0) { done = 1; if (blockIdx.x == 0) { out[0] = now() - begin; } }
  }
  if (C > 1) { __syncthreads(); asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory"); }
}
// The row alone: what a hand-off takes.
int main() {
  cudaFuncAttributes fa; CHECK(cudaFuncGetAttributes(&fa, go));
  size_t shared = 180 * 1024; int R = 4000;
  CHECK(cudaFuncSetAttribute(go, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  CHECK(cudaFuncSetAttribute(go, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  for (int C : {2, 4, 8, 16}) {
    cudaLaunchConfig_t c = {}; c.gridDim = 128; c.blockDim = 512; c.dynamicSmemBytes = shared;
    cudaLaunchAttribute a[1]; a[0].id = cudaLaunchAttributeClusterDimension; a[0].val.clusterDim.x = C; a[0].val.clusterDim.y = a[0].val.clusterDim.z = 1; c.attrs = a; c.numAttrs = 1;
    int n = 0; cudaError_t e = cudaOccupancyMaxActiveClusters(&n, go, &c); printf("clusters of %d: %d (%s)\n", C, n, cudaGetErrorString(e));
  }
  size_t bytes = (size_t)4 << 30; char *w; CHECK(cudaMalloc(&w, bytes)); CHECK(cudaMemset(w, 1, bytes));
  float4 *parts; uint32_t *row; unsigned long long *out; CHECK(cudaMalloc(&parts, 1 << 22)); CHECK(cudaMalloc(&row, 1 << 20)); CHECK(cudaMallocManaged(&out, 4096));
  for (uint32_t flying : {0u, 16u << 10, 32u << 10, 48u << 10, 64u << 10, 96u << 10}) for (int mode : {0, 1, 2}) {
    // mode 2: through global memory, launched in clusters too.
    CHECK(cudaMemset(row, 0, 1 << 20)); CHECK(cudaMemset(parts, 0, 1 << 22)); memset(out, 0, 4096);
    cudaLaunchConfig_t c = {}; c.gridDim = 128; c.blockDim = 512; c.dynamicSmemBytes = shared;
    cudaLaunchAttribute a[2]; a[0].id = cudaLaunchAttributeClusterDimension; a[0].val.clusterDim.x = mode == 1 ? 1 : 16; a[0].val.clusterDim.y = a[0].val.clusterDim.z = 1; a[1].id = cudaLaunchAttributeCooperative; a[1].val.cooperative = 1; c.attrs = a; c.numAttrs = 2;
    CHECK(cudaLaunchKernelEx(&c, go, mode == 0 ? 0 : 1, mode == 1 ? 1 : 16, R, flying, (const char *)w, bytes, parts, row, out));
    CHECK(cudaDeviceSynchronize());
    unsigned long long n = 0; for (int i = 0; i < 128; i++) n += out[2 + i];
    double us = out[0] / 1e3 / (R - R / 4 + 1);
    printf("flying %3u KB %s: %.3f us a round, %.2f TB/s\n", flying >> 10, mode == 0 ? "cluster" : mode == 1 ? "global" : "global, clusters", us, n / (us * R) / 1e6);
  }
}
