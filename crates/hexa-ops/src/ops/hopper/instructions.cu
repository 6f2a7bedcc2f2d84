// What the grouped products are made of: the device's instructions, numbers, activations, and a
// warp's way from sums to rows. Definitions in front of this text: IS_F16, ACTIVATION.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define CLUSTER 2  // cubes that share operands

#define GELU 0
#define GELU_TANH 1
#define RELU 2
#define SILU 3

struct __align__(64) TensorMap { u64 opaque[16]; };

// ---- Instructions ----
__device__ __forceinline__ u32 shared_address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_arrive_expecting(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Arrives at the barrier at this address of cube `rank` of the cluster.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank) : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\nbra again;\nover:\n}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;"
               ::: "memory");
}

// Copies a box of a tensor into the same place of every cube of the cluster.
__device__ __forceinline__ void copy_box(u32 target, const TensorMap* map, int column, int row,
                                         int matrix, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(target), "l"(map),
      "r"(column), "r"(row), "r"(matrix), "r"(barrier), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}

// Copies 16 bytes, or writes zeros if `valid` is false; `source` is not read then.
__device__ __forceinline__ void copy16(u32 target, const u16* source, bool valid) {
  u32 bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(bytes) : "memory");
}

// Arrives at the barrier once all copies that this thread has asked for are done.
__device__ __forceinline__ void arrive_after_copies(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Copies a box of a tensor into this cube.
__device__ __forceinline__ void copy_own_box(u32 target, const TensorMap* map, int column, int row,
                                             int matrix, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(target), "l"(map), "r"(column), "r"(row), "r"(matrix),
      "r"(barrier) : "memory");
}

// Descriptor of an operand with the 128-byte swizzle. `lead` is the distance of its blocks of 64
// along the rows' direction (read only if the operand is stored with the summed dimension first).
__device__ __forceinline__ u64 descriptor(u32 address, u32 lead) {
  return (u64)((address & 0x3ffff) >> 4) | ((u64)(lead >> 4) << 16) | ((u64)(1024 >> 4) << 32) |
         ((u64)1 << 62);
}

// The same in two words. The first may be moved on by sixteenths of an address without a carry; the
// second is the same for all operands.
__device__ __forceinline__ u32 descriptor_words(u32 address, u32 lead) {
  return ((address & 0x3ffff) >> 4) | (lead >> 4) << 16;
}
__device__ __forceinline__ u64 descriptor_of(u32 words) {
  return (u64)(1024 >> 4 | 1 << 30) << 32 | words;
}

// ---- Numbers ----
#if IS_F16
#define HALF "f16"
__device__ __forceinline__ float low_float(u32 pair) {
  float f; u16 h = (u16)pair; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f;
}
__device__ __forceinline__ float high_float(u32 pair) { return low_float(pair >> 16); }
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low)); return pair;
}
#else
#define HALF "bf16"
__device__ __forceinline__ float low_float(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(u32 pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 pair; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low)); return pair;
}
#endif

// ---- Activations ----
__device__ __forceinline__ float exp2_fast(float x) {
  float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
}

// Distribution function of the normal distribution. It is computed as often as the matrix unit
// multiplies 2 x 384 numbers: the error function's usual formulas, with two slow operations, would
// take longer than that.
#if IS_F16
// 1/2 + x * Q(x * x) with |x| cut off at 4.5; Q of degree 9 fitted for the least absolute error,
// which is below 1e-5, where an f16 near one is rounded by 5e-4.
__device__ __forceinline__ float normal_cdf(float x) {
  float c = fminf(fmaxf(x, -4.5f), 4.5f), u = c * c;
  float q = fmaf(-1.72628643e-12f, u, 2.02239975e-10f);
  q = fmaf(q, u, -1.05669411e-8f);
  q = fmaf(q, u, 3.27888785e-7f);
  q = fmaf(q, u, -6.81368329e-6f);
  q = fmaf(q, u, 1.01733734e-4f);
  q = fmaf(q, u, -1.14271371e-3f);
  q = fmaf(q, u, 9.89176985e-3f);
  q = fmaf(q, u, -6.64206743e-2f);
  q = fmaf(q, u, 3.98924679e-1f);
  return fmaf(c, q, 0.5f);
}
#else
// 1/2 + 1/2 * tanh(x * (c0 + c1 * x * x)), fitted to 3e-4; the unit's own tanh adds 2e-4. A bf16
// near one is rounded by 2e-3.
__device__ __forceinline__ float normal_cdf(float x) {
  float t;
  asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(x * fmaf(x * x, 0.03485454116f, 0.79961599019f)));
  return fmaf(t, 0.5f, 0.5f);
}
#endif

// Value and derivative of the activation of one number.
__device__ __forceinline__ void activate(float h, float& value, float& slope) {
#if ACTIVATION == GELU
  float phi = normal_cdf(h);
  value = h * phi;
  // The density is exp(-h * h / 2) / sqrt(2 * pi), here as a power of two.
  slope = fmaf(h, exp2_fast(fmaf(h * h, -0.7213475204444817f, -1.3257480647361593f)), phi);
#elif ACTIVATION == GELU_TANH
  float inner = 0.7978845608028654f * fmaf(0.044715f * h * h, h, h);
  float t = fmaf(-2.0f, reciprocal_fast(exp2_fast(2.8853900817779268f * inner) + 1.0f), 1.0f);
  value = 0.5f * h * (1.0f + t);
  slope = 0.5f * (1.0f + t) +
          0.5f * h * (1.0f - t * t) * 0.7978845608028654f * fmaf(0.134145f * h, h, 1.0f);
#elif ACTIVATION == RELU
  value = fmaxf(h, 0.0f);
  slope = h > 0.0f ? 1.0f : 0.0f;
#else
  float sigmoid = reciprocal_fast(1.0f + exp2_fast(-1.4426950408889634f * h));
  value = h * sigmoid;
  slope = sigmoid * fmaf(h, 1.0f - sigmoid, 1.0f);
#endif
}

// Of 8 gradients of the activation as a warp has them in its sums, and their pre-activations: to_h
// becomes the pre-activations' gradients and weighted the activations, both gate-weighted; dot grows
// by gradient times activation. gate and dot are of rows lane / 4 and lane / 4 + 8. Numbers are in
// pairs at once, for want of registers.
__device__ __forceinline__ void activate_vjp(const float* v, const u32* h, const float* gate,
                                             float* dot, u32* to_h, u32* weighted) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float grads[2], values[2];
    int half = i & 1;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float value, slope, grad = v[2 * i + j];
      activate(j ? high_float(h[i]) : low_float(h[i]), value, slope);
      dot[half] = fmaf(grad, value, dot[half]);
      values[j] = gate[half] * value;
      grads[j] = gate[half] * grad * slope;
    }
    to_h[i] = pack(grads[0], grads[1]);
    weighted[i] = pack(values[0], values[1]);
  }
}

// ---- Results on their way out ----
// A warp's buffer has 16 rows of 128 bytes, or 64 of 32 bytes if the result is transposed; chunks
// of 16 bytes are exchanged against bank conflicts. Buffers begin at multiples of 128, so that one
// exclusive or leads from a row's first chunk to any other.
__device__ __forceinline__ u32 patch_chunk(u32 patch, int row, int chunk) {
  return (patch + row * 128 + ((row & 7) << 4)) ^ (chunk << 4);
}
__device__ __forceinline__ u32 patch_chunk_transposed(u32 patch, int row, int chunk) {
  return patch + row * 32 + ((chunk ^ ((row >> 2) & 1)) << 4);
}

// Stores 16 x 16 numbers as a warp has them in its sums: pairs of columns 8 * chunk + 2 * (lane %
// 4) of rows lane / 4 and lane / 4 + 8, then the same 8 columns on. `chunk` is even.
__device__ __forceinline__ void patch_store_pairs(u32 patch, int chunk, const u32* pairs) {
  int lane = threadIdx.x % 32, matrix = lane >> 3;
  u32 at = patch_chunk(patch, (matrix & 1) * 8 + (lane & 7), matrix >> 1) ^ (chunk << 4);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(pairs[0]), "r"(pairs[1]), "r"(pairs[2]), "r"(pairs[3]) : "memory");
}
__device__ __forceinline__ void patch_store(u32 patch, int chunk, const float* v) {
  u32 pairs[4] = {pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
  patch_store_pairs(patch, chunk, pairs);
}
__device__ __forceinline__ void patch_store_transposed(u32 patch, int chunk, const float* v) {
  int lane = threadIdx.x % 32, matrix = lane >> 3;
  u32 at = patch_chunk_transposed(patch, (chunk + (matrix >> 1)) * 8 + (lane & 7), matrix & 1);
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(pack(v[0], v[1])), "r"(pack(v[2], v[3])), "r"(pack(v[4], v[5])),
               "r"(pack(v[6], v[7])) : "memory");
}

// The 16 x 16 numbers that patch_store_pairs() would have stored.
__device__ __forceinline__ void patch_load_pairs(u32 patch, int chunk, u32* pairs) {
  int lane = threadIdx.x % 32, matrix = lane >> 3;
  u32 at = patch_chunk(patch, (matrix & 1) * 8 + (lane & 7), matrix >> 1) ^ (chunk << 4);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3]) : "r"(at)
               : "memory");
}

// Sums over the 16 rows of a patch: of columns 8 * (chunk + i) + 2 * (lane % 4) and the next they are
// the first two of sums[i].
__device__ __forceinline__ void sum_rows(u32 patch, int chunk, float (*sums)[4]) {
  int lane = threadIdx.x % 32, matrix = lane >> 3;
  u32 at = patch_chunk(patch, (matrix & 1) * 8 + (lane & 7), matrix >> 1) ^ (chunk << 4);
  u32 rows[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(rows[0]), "=r"(rows[1]), "=r"(rows[2]), "=r"(rows[3]) : "r"(at) : "memory");
  u32 ones = pack(1.0f, 1.0f);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF ".f32 "
                 "{%0, %1, %2, %3}, {%4, %4, %4, %4}, {%5, %6}, {%7, %7, %7, %7};"
                 : "=f"(sums[i][0]), "=f"(sums[i][1]), "=f"(sums[i][2]), "=f"(sums[i][3])
                 : "r"(ones), "r"(rows[2 * i]), "r"(rows[2 * i + 1]), "f"(0.0f));
}

// Stores 16 bytes. Plain assignments are cut into words by some versions of the compiler.
__device__ __forceinline__ void store16(u16* to, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w) : "memory");
}

__device__ __forceinline__ uint4 patch_load(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
