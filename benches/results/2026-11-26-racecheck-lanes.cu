// What racecheck (compute-sanitizer 2025.3.1) says of one warp whose lanes feed rings of other warps, on an H100:
//   nvcc -O3 -arch=sm_90 -o lanes 2026-11-26-racecheck-lanes.cu && compute-sanitizer --tool racecheck ./lanes VARIANT
//   0: one lane feeds one warp, and waits for the place to be read      0 hazards
//   1: as 0, seven lanes, one for each of seven warps                    1 hazard
//   2: one lane, which looks (test_wait) and says so to its warp         0 hazards
//   3: as 2, seven lanes                                                 1 hazard
//   4: as 3, two copies a turn                                           2 hazards
//   5: as 4, one lane                                                    0 hazards
// The pattern is the same in all: who copies has waited for the barrier at which every reader arrives after reading. So the
// tool does not follow barriers that lanes of one warp wait for apart; feeders of the decode kernel are such lanes.
#include <cstdio>
typedef unsigned u32;
typedef unsigned long long u64;
__device__ u32 s32(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ bool test(u64 *b, u32 ph) {
    u32 ok;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}" : "=r"(ok) : "r"(s32(b)), "r"(ph) : "memory");
    return ok;
}
__device__ void wait(u64 *b, u32 ph) {
    u32 ok;
    do asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared.b64 p,[%1],%2; selp.u32 %0,1,0,p;}" : "=r"(ok) : "r"(s32(b)), "r"(ph) : "memory");
    while (!ok);
}
__device__ void copy(u32 to, const u32 *from, u32 bytes, u64 *full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(s32(full)) : "memory");
}
// W warps that read, each with a ring of three places; lane w of the last warp feeds warp w.
template <int V, int W> __global__ void k(const u32 *in, u32 *out) {
    __shared__ __align__(128) u32 ring[W][3][128];
    __shared__ u64 full[W][3], empty[W][3];
    if (threadIdx.x == 0)
        for (int w = 0; w < W; w++)
            for (int i = 0; i < 3; i++) {
                asm volatile("mbarrier.init.shared.b64 [%0],1;" ::"r"(s32(&full[w][i])));
                asm volatile("mbarrier.init.shared.b64 [%0],32;" ::"r"(s32(&empty[w][i])));
            }
    asm volatile("fence.mbarrier_init.release.cluster;");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    int lane = threadIdx.x % 32, w = threadIdx.x / 32;
    if (w == W) {
        for (int i = 0;;) {
            bool more = lane < W && i < 12, go;
            if (!__any_sync(~0u, more)) break;
            int s = i % 3;
            u32 ph = (i / 3) & 1;
            if (V == 0) {
                go = more;
                if (more) wait(&empty[lane][s], ph ^ 1);
            } else {
                bool room = more && test(&empty[lane][s], ph ^ 1);
                go = __ballot_sync(~0u, room) >> lane & 1;
            }
            if (!go) continue;
            asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],512;" ::"r"(s32(&full[lane][s])) : "memory");
            if (V == 2)
                for (int h = 0; h < 2; h++) copy(s32(ring[lane][s]) + 256 * h, in + i * 128 + 64 * h, 256, &full[lane][s]);
            else
                copy(s32(ring[lane][s]), in + i * 128, 512, &full[lane][s]);
            i++;
        }
    } else {
        u32 sum = 0;
        for (int i = 0; i < 12; i++) {
            int s = i % 3;
            wait(&full[w][s], (i / 3) & 1);
            for (int j = 0; j < 4; j++) sum += ring[w][s][lane + 32 * j];
            asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t,[%0];}" ::"r"(s32(&empty[w][s])) : "memory");
        }
        out[threadIdx.x] = sum;
    }
}
int main(int argc, char **argv) {
    u32 *in, *out;
    cudaMallocManaged(&in, 12 * 512);
    cudaMallocManaged(&out, 4096);
    for (int i = 0; i < 12 * 128; i++) in[i] = i;
    switch (argc > 1 ? argv[1][0] : '0') {
    case '0': k<0, 1><<<1, 64>>>(in, out); break;
    case '1': k<0, 7><<<1, 256>>>(in, out); break;
    case '2': k<1, 1><<<1, 64>>>(in, out); break;
    case '3': k<1, 7><<<1, 256>>>(in, out); break;
    case '4': k<2, 7><<<1, 256>>>(in, out); break;
    case '5': k<2, 1><<<1, 64>>>(in, out); break;
    }
    cudaError_t e = cudaDeviceSynchronize();
    printf("%s %u\n", cudaGetErrorString(e), out[0]);
}
