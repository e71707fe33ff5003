// What compute-sanitizer's racecheck makes of the barriers of `decode`, each program by the book: of sixteen warps twelve write, three read
// what they wrote, and one does neither. All of the fifteen come to barrier 3 (bar.sync 3, 480) between writing and reading, and the places
// are two in turn, so that nobody writes what another may still read.
//   0  that alone.
//   1  the writers have a barrier of their own as well (bar.sync 1, 384), as they have in `decode` between bringing a row in and multiplying.
// On an H100 80GB HBM3, 2026-11-26: no hazard; 100 displayed, 274 errors, all of writes before barrier 3 and reads behind it. So two named
// barriers whose threads overlap are more than it keeps track of. Both print the same sums.
// nvcc -arch=sm_90 2026-11-26-racecheck-barriers.cu && compute-sanitizer --tool racecheck ./a.out 0|1
#include <cstdio>
#include <cstdlib>

template <int ID, int THREADS> __device__ void barrier() { asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory"); }

template <bool TWO> __global__ void steps(float *out, int n) {
    __shared__ float parts[2][16][12];
    __shared__ float row[384];
    int t = threadIdx.x, warp = t / 32, lane = t % 32;
    if (warp < 12) {
        for (int i = 0; i < n; i++) {
            float v = i;
            if (TWO) {
                row[t] = i;
                barrier<1, 384>();
                v = row[t * 7 % 384];
            }
            if (lane < 16) parts[i % 2][lane][warp] = v;
            barrier<3, 480>();
        }
    } else if (warp < 15) {
        float sum = 0;
        for (int i = 0; i < n; i++) {
            barrier<3, 480>();
            for (int j = 0; j < 12; j++) sum += parts[i % 2][lane % 16][j];
        }
        out[t - 384] = sum;
    }
}

int main(int count, char **arguments) {
    float *out, first;
    cudaMalloc(&out, 96 * sizeof(float));
    bool two = count > 1 && atoi(arguments[1]) == 1;
    for (int i = 0; i < 50; i++) two ? steps<true><<<2, 512>>>(out, 20) : steps<false><<<2, 512>>>(out, 20);
    cudaMemcpy(&first, out, sizeof first, cudaMemcpyDeviceToHost);
    printf("%g: %s\n", first, cudaGetErrorString(cudaDeviceSynchronize()));
}
