// What goes before the grouped products and follows them: rows brought into expert order, sums over
// parts, over column tiles and over slabs, and the second bias' share of two gradients. Definitions in
// front of this text: IS_F16, TOP_K, SLAB_ROWS, TILE_SLABS (slabs of a tile).

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

// The eight numbers of 16 bytes.
__device__ __forceinline__ void unpack(uint4 bits, float* values) {
  u32 pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = to_float((u16)pairs[i]);
    values[2 * i + 1] = to_float((u16)(pairs[i] >> 16));
  }
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
  u64 num_slots, column_tiles, num_experts, d_model, has_bias, sums_bias, grad_stride, bias_stride;
};

// First of an expert's slabs, of which each has the sum over SLAB_ROWS rows: tiles are counted as if
// each expert's last one were whole.
__device__ __forceinline__ int first_slab(int begin, int expert) {
  return (begin / (SLAB_ROWS * TILE_SLABS) + expert) * TILE_SLABS;
}

// What the second bias has to do with, in one pass over the rows of the result's gradient dy:
//   grad_gates[slot] = sum of the column tiles' parts + dy[token] . b2[expert]
//   slabs[slab]      = sum of gate * dy[token] over the slab's rows, if sums_bias
// A warp for each slab.
extern "C" __global__ void __launch_bounds__(256, 3) hexa_gate_gradient(
    const float* __restrict__ parts, const u16* __restrict__ grad_output,
    const u16* __restrict__ bias, const u16* __restrict__ gates, const int* __restrict__ slots,
    const int* __restrict__ offsets, float* __restrict__ slabs, u16* __restrict__ grad_gates,
    const __grid_constant__ GateParams p) {
  int slab = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
  int low = 0, high = (int)p.num_experts;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (first_slab(offsets[middle], middle) <= slab) low = middle; else high = middle;
  }
  int begin = offsets[low] + (slab - first_slab(offsets[low], low)) * SLAB_ROWS;
  int len = min(SLAB_ROWS, offsets[low + 1] - begin);
  if (len <= 0) return;

  int slot = lane < len ? slots[begin + lane] : 0;
  float gate = lane < len ? to_float(gates[slot]) : 0.0f;
  u64 row = (u64)(slot / TOP_K) * p.grad_stride;
  float dots[SLAB_ROWS];
#pragma unroll
  for (int r = 0; r < SLAB_ROWS; ++r) dots[r] = 0.0f;
  for (int block = 0; block < (int)p.d_model; block += 256) {
    int column = block + lane * 8;
    bool valid = column < (int)p.d_model;
    float factors[8], sums[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) factors[i] = sums[i] = 0.0f;
    if (p.has_bias && valid)
      unpack(*(const uint4*)(bias + (u64)low * p.bias_stride + column), factors);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 dy[SLAB_ROWS / 2];
#pragma unroll
      for (int r = 0; r < SLAB_ROWS / 2; ++r) {
        u64 from = __shfl_sync(~0u, row, half * SLAB_ROWS / 2 + r) + column;
        dy[r] = valid && half * SLAB_ROWS / 2 + r < len ? *(const uint4*)(grad_output + from)
                                                        : make_uint4(0, 0, 0, 0);
      }
#pragma unroll
      for (int r = 0; r < SLAB_ROWS / 2; ++r) {
        float values[8], weight = __shfl_sync(~0u, gate, half * SLAB_ROWS / 2 + r);
        unpack(dy[r], values);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& dot = dots[half * SLAB_ROWS / 2 + r];
          dot = fmaf(values[i], factors[i], dot);
          sums[i] = fmaf(weight, values[i], sums[i]);
        }
      }
    }
    if (p.sums_bias && valid) {
      float4* to = (float4*)(slabs + (u64)slab * p.d_model + column);
      to[0] = make_float4(sums[0], sums[1], sums[2], sums[3]);
      to[1] = make_float4(sums[4], sums[5], sums[6], sums[7]);
    }
  }
  // Lanes add up what they have of half of their rows, until each pair has one row.
#pragma unroll
  for (int count = SLAB_ROWS / 2; count > 0; count /= 2) {
    bool is_upper = lane & 2 * count;
#pragma unroll
    for (int r = 0; r < count; ++r) {
      float given = is_upper ? dots[r] : dots[count + r];
      float kept = is_upper ? dots[count + r] : dots[r];
      dots[r] = kept + __shfl_xor_sync(~0u, given, 2 * count);
    }
  }
  int own = lane / 2;
  float dot = dots[0];
  for (int tile = lane % 2; tile < (int)p.column_tiles; tile += 2)
    if (own < len) dot += parts[(u64)tile * p.num_slots + begin + own];
  dot += __shfl_xor_sync(~0u, dot, 1);
  int to = __shfl_sync(~0u, slot, own);
  if (lane % 2 == 0 && own < len) grad_gates[to] = from_float(dot);
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

// out[e] = the sum of an expert's slabs. A cube for each expert and 32 columns: each thread has four of
// these and every 32nd slab.
extern "C" __global__ void hexa_sum_slabs(const float* __restrict__ slabs,
                                          const int* __restrict__ offsets, u16* __restrict__ out,
                                          const __grid_constant__ SlabParams p) {
  __shared__ float sums[32][32];
  int expert = blockIdx.y, begin = offsets[expert], rows = offsets[expert + 1] - begin;
  int count = (rows + SLAB_ROWS - 1) / SLAB_ROWS, part = threadIdx.x / 8, quad = threadIdx.x % 8;
  int column = blockIdx.x * 32 + quad * 4;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (column < (int)p.width) {
    const float* from = slabs + (u64)first_slab(begin, expert) * p.width + column;
#pragma unroll 8
    for (int i = part; i < count; i += 32) {
      float4 v = *(const float4*)(from + (u64)i * p.width);
      sum.x += v.x; sum.y += v.y; sum.z += v.z; sum.w += v.w;
    }
  }
  *(float4*)&sums[part][quad * 4] = sum;
  __syncthreads();
  column = blockIdx.x * 32 + threadIdx.x;
  if (threadIdx.x >= 32 || column >= (int)p.width) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < 32; ++i) total += sums[i][threadIdx.x];
  out[(u64)expert * p.out_stride + column] = from_float(total);
}
