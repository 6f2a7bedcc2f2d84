// What goes before the grouped products and follows them: rows brought into expert order, sums over
// parts, over column tiles and over slabs. Definitions in front of this text: IS_F16, TOP_K.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ float to_float(u16 bits) {
#if IS_F16
  float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits)); return f;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}

__device__ __forceinline__ u16 from_float(float value) {
  u16 bits;
#if IS_F16
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

struct RowParams { u64 num_slots, width, stride; };

// out[p] = x[token of the slot at p], in pieces of 16 bytes; a warp for each row.
extern "C" __global__ void hexa_sort_rows(const u16* __restrict__ x, const int* __restrict__ slots,
                                          u16* __restrict__ out,
                                          const __grid_constant__ RowParams p) {
  u64 position = ((u64)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (position >= p.num_slots) return;
  const uint4* from = (const uint4*)(x + (u64)(slots[position] / TOP_K) * p.stride);
  uint4* to = (uint4*)(out + position * p.width);
  for (int i = threadIdx.x % 32; i < (int)p.width / 8; i += 32) to[i] = from[i];
}

struct GateParams {
  u64 num_slots, column_tiles, num_experts, d_model, has_bias, grad_stride, bias_stride;
};

// grad_gates[slot] = sum of the column tiles' parts + dy[token] . b2[expert]; a warp for each token,
// which reads dy once for all choices.
extern "C" __global__ void hexa_gate_gradient(
    const float* __restrict__ parts, const u16* __restrict__ grad_output,
    const u16* __restrict__ bias, const int* __restrict__ positions,
    const int* __restrict__ offsets, u16* __restrict__ grad_gates,
    const __grid_constant__ GateParams p) {
  int token = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  int first = token * TOP_K;
  if (first >= (int)p.num_slots) return;
  float sums[TOP_K];
  const u32* biases[TOP_K];
#pragma unroll
  for (int choice = 0; choice < TOP_K; ++choice) {
    sums[choice] = 0.0f;
    int position = positions[first + choice], low = 0, high = (int)p.num_experts;
    for (int tile = lane; tile < (int)p.column_tiles; tile += 32)
      sums[choice] += parts[(u64)tile * p.num_slots + position];
    while (high - low > 1) {
      int middle = (low + high) / 2;
      if (offsets[middle] <= position) low = middle; else high = middle;
    }
    biases[choice] = (const u32*)(bias + (u64)low * p.bias_stride);
  }
  if (p.has_bias) {
    const u32* dy = (const u32*)(grad_output + (u64)token * p.grad_stride);
    for (int i = lane; i < (int)p.d_model / 2; i += 32) {
      u32 x = dy[i];
#pragma unroll
      for (int choice = 0; choice < TOP_K; ++choice) {
        u32 y = biases[choice][i];
        sums[choice] = fmaf(to_float((u16)x), to_float((u16)y), sums[choice]);
        sums[choice] = fmaf(to_float((u16)(x >> 16)), to_float((u16)(y >> 16)), sums[choice]);
      }
    }
  }
#pragma unroll
  for (int choice = 0; choice < TOP_K; ++choice) {
    float sum = sums[choice];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) grad_gates[first + choice] = from_float(sum);
  }
}

struct PartParams { u64 elements, chunk, out_stride; };

// out[e] = the sum of its slabs, in order, for the experts with more rows than a chunk; the others'
// results are there already. Slabs lie in the order of the experts. One row of cubes for each expert.
extern "C" __global__ void hexa_sum_parts(const float* __restrict__ parts,
                                          const int* __restrict__ offsets, u16* __restrict__ out,
                                          const __grid_constant__ PartParams p) {
  int expert = blockIdx.y, chunk = (int)p.chunk;
  int rows = offsets[expert + 1] - offsets[expert];
  if (rows <= chunk) return;
  u64 first = 0;
  for (int e = 0; e < expert; ++e) {
    int others = offsets[e + 1] - offsets[e];
    if (others > chunk) first += (others + chunk - 1) / chunk;
  }
  int count = (rows + chunk - 1) / chunk;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < p.elements / 4;
       i += (u64)gridDim.x * blockDim.x) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int part = 0; part < count; ++part) {
      float4 v = *(const float4*)(parts + (first + part) * p.elements + 4 * i);
      sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w;
    }
    u16* to = out + (u64)expert * p.out_stride + 4 * i;
    *(uint2*)to = make_uint2((u32)from_float(sum.x) | (u32)from_float(sum.y) << 16,
                             (u32)from_float(sum.z) | (u32)from_float(sum.w) << 16);
  }
}

struct SlabParams { u64 width, out_stride; };

// out[e] = the sum of an expert's slabs, one for every 16 rows, where stationary.cu puts them: eight for
// a tile of 128 rows, which the last may not fill. A cube for each expert and 32 columns, with eight threads for each.
extern "C" __global__ void hexa_sum_slabs(const float* __restrict__ slabs,
                                          const int* __restrict__ offsets, u16* __restrict__ out,
                                          const __grid_constant__ SlabParams p) {
  __shared__ float sums[8][32];
  int expert = blockIdx.y, begin = offsets[expert], rows = offsets[expert + 1] - begin;
  u64 first = (u64)(begin / 128 + expert) * 8;
  int count = (rows + 15) / 16, part = threadIdx.x / 32, lane = threadIdx.x % 32;
  u64 column = (u64)blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (column < p.width) {
#pragma unroll 8
    for (int i = part; i < count; i += 8) sum += slabs[(first + i) * p.width + column];
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part > 0 || column >= p.width) return;
  for (int i = 1; i < 8; ++i) sum += sums[i][lane];
  out[(u64)expert * p.out_stride + column] = from_float(sum);
}
