// What compute-sanitizer's racecheck makes of two protocols of `decode`, each by the book:
//   0  one warp leaves values and comes to a named barrier without waiting (bar.arrive), another waits there (bar.sync) and
//      reads them; a second barrier says the same of the place being free. (PTX ISA, "bar, barrier": its producer and consumer.)
//   1  a lane fills a place and arrives at an mbarrier; all lanes of another warp wait for it and read; after __syncwarp one of
//      them arrives for all at the mbarrier that the first waits for.
//   2  as 1, with an arrival of every lane.
// On an H100 80GB HBM3, 2026-11-26: one error (reads, and the writes after them), one error (the same), none. All three print 3048 2800.
// nvcc -arch=sm_90 2026-11-26-racecheck-arrive.cu && compute-sanitizer --tool racecheck ./a.out 0|1|2
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

__device__ void named(int *out) {
    __shared__ int place[2][32];
    int lane = threadIdx.x % 32, sum = 0;
    if (threadIdx.x < 32) {
        for (int i = 0; i < 8; i++) {
            asm volatile("barrier.cta.sync %0, 64;" ::"r"(1 + i % 2) : "memory");
            place[i % 2][lane] = 100 * i + lane;
            asm volatile("barrier.cta.arrive %0, 64;" ::"r"(3 + i % 2) : "memory");
        }
    } else {
        asm volatile("barrier.cta.arrive 1, 64;" ::: "memory");
        asm volatile("barrier.cta.arrive 2, 64;" ::: "memory");
        for (int i = 0; i < 8; i++) {
            asm volatile("barrier.cta.sync %0, 64;" ::"r"(3 + i % 2) : "memory");
            sum += place[i % 2][31 - lane];
            if (i < 6) asm volatile("barrier.cta.arrive %0, 64;" ::"r"(1 + i % 2) : "memory");
        }
        out[lane] = sum;
    }
}

__device__ unsigned addr(void *p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void arrive(unsigned long long *b) {
    asm volatile("{ .reg .b64 s; mbarrier.arrive.shared.b64 s, [%0]; }" ::"r"(addr(b)) : "memory");
}
__device__ void wait(unsigned long long *b, unsigned parity) {
    unsigned done = 0;
    while (!done)
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done) : "r"(addr(b)), "r"(parity) : "memory");
}

__device__ void lanes(int *out, bool all) {
    __shared__ int place[2][32];
    __shared__ unsigned long long come[2], read[2];
    int lane = threadIdx.x % 32, sum = 0;
    if (threadIdx.x < 2) {
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(addr(&come[threadIdx.x])), "r"(1));
        asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(addr(&read[threadIdx.x])), "r"(all ? 32 : 1));
    }
    __syncthreads();
    for (int i = 0; i < 8; i++) {
        int at = i % 2, parity = i / 2 % 2;
        if (threadIdx.x >= 32) {
            wait(&read[at], parity ^ 1);
            if (lane == 0) {
                for (int k = 0; k < 32; k++) place[at][k] = 100 * i + k;
                arrive(&come[at]);
            }
            __syncwarp();
        } else {
            wait(&come[at], parity);
            sum += place[at][31 - lane];
            __syncwarp();
            if (all || lane == 0) arrive(&read[at]);
        }
    }
    if (threadIdx.x < 32) out[lane] = sum;
}

__global__ void kernel(int *out, int which) {
    if (which == 0) named(out);
    else lanes(out, which == 2);
}

int main(int argc, char **argv) {
    int *out, host[32];
    cudaMalloc(&out, sizeof host);
    kernel<<<1, 64>>>(out, atoi(argv[1]));
    cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost);
    printf("%d %d\n", host[0], host[31]);
}
