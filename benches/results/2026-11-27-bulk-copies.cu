// How fast cp.async.bulk brings rows: bytes a copy, from row to row, copies a slot, slots.
#include <cstdio>
#include <cstdint>
#include <cuda_runtime.h>
__device__ inline uint32_t sm(const void*p){return (uint32_t)__cvta_generic_to_shared(p);}
__global__ void k(const uint8_t*src,size_t rows,int bytes,int stride,int per,int pitch,int slots,int width,unsigned*out){
  extern __shared__ __align__(128) uint8_t s[]; __shared__ __align__(8) uint64_t bar[32];
  if(threadIdx.x==0){for(int i=0;i<slots;i++)asm volatile("mbarrier.init.shared.b64 [%0],1;"::"r"(sm(&bar[i])));asm volatile("fence.mbarrier_init.release.cluster;");
    size_t share=(rows/per+gridDim.x-1)/gridDim.x; size_t t0=share*blockIdx.x,t1=t0+share; if(t1>rows/per)t1=rows/per;
    uint32_t ph=0; unsigned acc=0;
    for(size_t t=t0,i=0;t<t1+slots;t++,i++){int j=i%slots;
      if(i>=slots){ // wait
        uint32_t par=((i/slots)-1)&1,done=0; while(!done)asm volatile("{.reg .pred p;mbarrier.try_wait.parity.shared.b64 p,[%1],%2;selp.u32 %0,1,0,p;}":"=r"(done):"r"(sm(&bar[j])),"r"(par));
        acc+=s[j*pitch*per];}
      if(t<t1){asm volatile("{.reg .b64 x;mbarrier.arrive.expect_tx.shared.b64 x,[%0],%1;}"::"r"(sm(&bar[j])),"r"(bytes*per));
        for(int r=0;r<per;r++)asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];"::"r"(sm(s)+(uint32_t)((j*per+r)*pitch)),"l"(src+(t*per+r)*(size_t)stride),"r"(bytes),"r"(sm(&bar[j])):"memory");}
    } out[blockIdx.x]=acc;(void)ph;}
}
int main(){ size_t total=3ull<<30; uint8_t*d; unsigned*o; cudaMalloc(&d,total); cudaMalloc(&o,4096); cudaMemset(d,1,total);
  cudaFuncSetAttribute(k,cudaFuncAttributeMaxDynamicSharedMemorySize,200<<10);
  auto go=[&](const char*name,int bytes,int stride,int per,int pitch,int slots){
    size_t rows=(size_t)146e6/stride; float best=1e9; cudaEvent_t a,b; cudaEventCreate(&a);cudaEventCreate(&b); float sum=0;
    for(int i=0;i<20;i++){ const uint8_t*p=d+(size_t)i*(150u<<20)%(total-(160u<<20)); p=(const uint8_t*)((uintptr_t)p&~(uintptr_t)255);
      cudaEventRecord(a); k<<<132,32,200<<10>>>(p,rows,bytes,stride,per,pitch,slots,0,o); cudaEventRecord(b); cudaEventSynchronize(b); float ms; cudaEventElapsedTime(&ms,a,b); if(i>2){sum+=ms; if(ms<best)best=ms;} }
    cudaError_t e=cudaGetLastError(); float mean=sum/17;
    printf("%-44s mean %.1f us %.0f GB/s, best %.0f GB/s %s\n",name,mean*1e3,rows*(double)bytes/mean/1e6,rows*(double)bytes/best/1e6,e?cudaGetErrorString(e):"");};
  go("960 of 960, 16 a slot, 11 slots",960,960,16,976,11);
  go("960 of 960, 16 a slot, 6 slots",960,960,16,976,6);
  go("960 of 960, 16 a slot, 3 slots",960,960,16,976,3);
  go("976 of 976, 16 a slot, 11 slots",976,976,16,976,11);
  go("15360 at once, 11 slots",15360,15360,1,15360,11);
  go("15616 at once, 11 slots",15616,15616,1,15616,11);
  go("15616 at once, 6 slots",15616,15616,1,15616,6);
  go("1024 of 1024, 16 a slot, 11 slots",1024,1024,16,1040,11);
  go("1280 of 1280, 16 a slot, 8 slots",1280,1280,16,1296,8);
  go("20736 at once, 8 slots",20736,20736,1,20736,8);
  go("4096 of 4096, 8 a slot, 5 slots",4096,4096,8,4096,5);
  go("1152 of 2304, 16 a slot, 10 slots",1152,1152,16,1168,10);
  go("624 of 624, 16 a slot, 16 slots",624,624,16,624,16);
  go("9984 at once, 16 slots",9984,9984,1,9984,16);
  return 0;}
