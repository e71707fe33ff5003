#include <cstdio>
#include <cstdint>
#include <cstdlib>
#include <algorithm>
#include <cuda_runtime.h>
#define CK(x) do{cudaError_t e=(x); if(e!=cudaSuccess){printf("%s line %d\n",cudaGetErrorString(e),__LINE__);exit(1);}}while(0)
typedef unsigned long long u64;
__device__ __forceinline__ uint4 ldr(const void*p){uint4 v;asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3},[%4];":"=r"(v.x),"=r"(v.y),"=r"(v.z),"=r"(v.w):"l"(p):"memory");return v;}
__device__ __forceinline__ void st4(void*p,uint32_t v){asm volatile("st.relaxed.gpu.global.v4.u32 [%0],{%1,%1,%1,%1};"::"l"(p),"r"(v):"memory");}
__device__ __forceinline__ void red64(u64*p,u64 v){asm volatile("red.relaxed.gpu.global.add.u64 [%0],%1;"::"l"(p),"l"(v):"memory");}
__device__ __forceinline__ void red32(uint32_t*p,uint32_t v){asm volatile("red.relaxed.gpu.global.add.u32 [%0],%1;"::"l"(p),"r"(v):"memory");}
__device__ __forceinline__ bool on(uint4 v,uint32_t it){return v.x==it&&v.y==it&&v.z==it&&v.w==it;}
#define SYNC asm volatile("bar.sync 1,384;":::"memory")
// one ordinary hand-off of a row of 132*8 words
__device__ __forceinline__ void hop(uint32_t*b,int it){
  int t=threadIdx.x;
  if(t<2) st4(b+blockIdx.x*8+t*4,it);
  int total=8*gridDim.x;
  for(int at=t*4;at<(total+127)/128*128;at+=384*4){ const uint32_t*r=b+min(at,total-4); uint4 v; do v=ldr(r); while(!__all_sync(~0u,on(v,it))); }
  SYNC;
}
// MODE 0: nothing; 1: parts, merged, row; 2: red64, all poll values; 3: red64, poll flags; 4: red64, C copies
template<int MODE> __global__ void __launch_bounds__(512,1) k(uint32_t*row,uint32_t*row2,uint32_t*parts,u64*tot,int groups,int W,int S,int readers,int copies,int its,u64*out){
  int t=threadIdx.x,b=blockIdx.x; if(t>=384) return;
  u64 t0; asm volatile("mov.u64 %0,%globaltimer;":"=l"(t0));
  int all=groups*W; // words
  for(int it=1;it<=its;it++){
    hop(row+(it%3)*4096,it);
    u64*T=tot+(size_t)(it%3)*(1<<18), *N=tot+(size_t)((it+1)%3)*(1<<18);
    int first=132-groups*S; bool att=b>=first; int g=(b-first)/S,s=(b-first)%S;
    if(MODE==1){
      uint32_t*P=parts+(size_t)(it%3)*(1<<20);
      if(att&&t*4<W){ int oct=t/2,h=t%2; st4(P+((size_t)(g*(W/8)+oct)*S+s)*8+h*4,it); }
      int tasks=all/8; int mergers=min(132,132-readers); if(mergers<tasks/12+1) mergers=132;
      if(b<mergers) for(int task=b+t/32*mergers;task<tasks;task+=mergers*12){
        for(int l=t%32;l<(S+31)/32*32;l+=32){ const uint32_t*r=P+((size_t)task*S+min(l,S-1))*8; uint4 v,w; do{v=ldr(r);w=ldr(r+4);}while(!__all_sync(~0u,on(v,it)&&on(w,it))); }
        if(t%32<2) st4(row2+(it%3)*8192+task*8+t%32*4,it);
      }
      if(b>=132-readers) for(int at=t*4;at<(all+127)/128*128;at+=384*4){ const uint32_t*r=row2+(it%3)*8192+min(at,all-4); uint4 v; do v=ldr(r); while(!__all_sync(~0u,on(v,it))); }
      SYNC;
    }
    if(MODE>=2){
      // clear the next
      if(att){ for(int i=(b-first)*384+t;i<all*copies/2+groups*copies;i+=groups*S*384) st4(N+2*(size_t)i,0); }
      int C=copies; 
      if(att&&t*4<W){ u64*to=T+(size_t)(s%C)*(all+2*groups)+g*W; int j=t; for(int kk=0;kk<4;kk++) red64(to+(kk/2)*(W/2)+j*2+kk%2,(5ull<<7)|1); if(t==0) red64(T+(size_t)(s%C)*(all+2*groups)+all+2*g,1),red64(T+(size_t)(s%C)*(all+2*groups)+all+2*g+1,1); }
      if(b<readers){
        if(MODE==3){ for(int c=0;c<C;c++){ int per=S/C+(c<S%C); uint4 v; const u64*r=T+(size_t)c*(all+2*groups)+all+2*(t%groups); do v=ldr(r); while(!__all_sync(~0u,(v.x&127)==per&&(v.z&127)==per)); } }
        for(int at=t*2;at<(all/2+63)/64*64;at+=384*2) for(int c=0;c<C;c++){ int per=S/C+(c<S%C); const u64*r=T+(size_t)c*(all+2*groups)+min(at,all/2-2); uint4 v,w; do{v=ldr(r);w=ldr(r+all/2);}while(!__all_sync(~0u,(v.x&127)==per&&(v.z&127)==per&&(w.x&127)==per&&(w.z&127)==per)); }
      }
      SYNC;
    }
  }
  u64 t1; asm volatile("mov.u64 %0,%globaltimer;":"=l"(t1));
  if(t==0&&b==0) out[0]=t1-t0;
}
uint32_t*row,*row2,*parts; u64*tot,*out; int its=2000;
template<int MODE> double go(int groups,int W,int S,int readers,int copies){
  double best=1e9; for(int rep=0;rep<3;rep++){ CK(cudaMemset(row,0,1<<20));CK(cudaMemset(row2,0,1<<20));CK(cudaMemset(parts,0,16<<20));CK(cudaMemset(tot,0,16<<20));
   k<MODE><<<132,512>>>(row,row2,parts,tot,groups,W,S,readers,copies,its,out); CK(cudaDeviceSynchronize()); best=std::min(best,out[0]/1000.0/its);} return best; }
int main(){ CK(cudaMalloc(&row,1<<20));CK(cudaMalloc(&row2,1<<20));CK(cudaMalloc(&parts,16<<20));CK(cudaMalloc(&tot,16<<20));CK(cudaMallocManaged(&out,64));
  int cases[][4]={{2,448,30,56},{2,448,30,132},{2,448,8,56},{2,448,60,56},{2,768,66,96},{8,512,16,132},{8,512,8,132}};
  for(auto&c:cases){ double z=go<0>(c[0],c[1],c[2],c[3],1); printf("groups %d W %d S %d readers %d: hop %.2f | parts+merge %.2f",c[0],c[1],c[2],c[3],z,go<1>(c[0],c[1],c[2],c[3],1)-z);
   for(int C: {1,2,4,8}) printf(" | C%d red %.2f flags %.2f",C,go<2>(c[0],c[1],c[2],c[3],C)-z,go<3>(c[0],c[1],c[2],c[3],C)-z); printf("\n"); fflush(stdout);} }
