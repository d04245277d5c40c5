// Weight-only FP4 linear layer on CPUs: products of one or a few rows, and decoding. Plain C interface.
//
// Weights are in the plain layout: two E2M1 codes a byte, the even element in the low nibble; one scale byte a block.
// The caller passes the 256 values of the scale byte, so one code path serves every format.

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int kGroup = 32;  // elements that are decoded together: two NVFP4 blocks, one MXFP4 block
constexpr int kLanes = 16;  // elements that one vector operation takes
constexpr int64_t kRowsEach = 16;
constexpr int64_t kLeastWork = 1 << 17;  // products that are worth another thread
constexpr int64_t kAhead = 2048;  // bytes of codes to ask memory for in advance; addresses past the end do no harm
alignas(64) constexpr float kE2M1[16] = {0.f,  .5f,  1.f,  1.5f,  2.f,  3.f,  4.f,  6.f,
                                         -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};

}  // namespace

#if defined(__AVX512F__)
#include "fp4_linear_cpu_avx512.h"
#endif

namespace {

// Sixteen floats, and the same operations for each kind of vector: decode() takes 16 bytes of codes and gives the even
// elements of a group of 32 and the odd ones (AVX2: those of even bytes and those of odd ones); two_scales() is `a` in
// the first eight lanes and `b` in the others; interleave() puts elements back in order.
#if defined(__AVX512F__)

struct Lanes {
  __m512 v;
};
inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void decode(const uint8_t* p, Lanes& even, Lanes& odd) {
  const __m512 table = _mm512_load_ps(kE2M1);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  even.v = _mm512_permutexvar_ps(bytes, table);  // takes the low four bits of each index
  odd.v = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table);
}
inline Lanes two_scales(const float* a, const float* b) {
  return {_mm512_mask_broadcastss_ps(_mm512_set1_ps(*a), 0xFF00, _mm_load_ss(b))};
}
inline Lanes multiply(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Lanes scaled(Lanes a, float s) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(s))}; }
inline Lanes add_product(Lanes acc, Lanes a, Lanes b) { return {_mm512_fmadd_ps(a.v, b.v, acc.v)}; }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }
inline void interleave(Lanes even, Lanes odd, float* p) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  _mm512_storeu_ps(p, _mm512_permutex2var_ps(even.v, first, odd.v));
  _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(even.v, last, odd.v));
}

#elif defined(__AVX2__)

struct Lanes {
  __m256 v[2];
};
inline Lanes zero() { return {{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
inline Lanes load(const float* p) { return {{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}}; }
inline void decode(const uint8_t* p, Lanes& first, Lanes& second) {
  const __m256i low = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0,
                                                                64, -128, -64));
  const __m256i high = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, -128, -65, -65, -65, -64,
                                                                 -64, -64, -64));
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i shifted = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
  // the upper half of each float, in two bytes
  const __m256i lows = _mm256_shuffle_epi8(low, codes), highs = _mm256_shuffle_epi8(high, codes);
  const __m256i halves[2] = {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
  for (int i = 0; i < 2; ++i) {
    first.v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(halves[i], 16));
    second.v[i] = _mm256_castsi256_ps(_mm256_and_si256(halves[i], _mm256_set1_epi32(-65536)));
  }
}
inline Lanes two_scales(const float* a, const float* b) { return {{_mm256_broadcast_ss(a), _mm256_broadcast_ss(b)}}; }
inline Lanes multiply(Lanes a, Lanes b) { return {{_mm256_mul_ps(a.v[0], b.v[0]), _mm256_mul_ps(a.v[1], b.v[1])}}; }
inline Lanes scaled(Lanes a, float s) {
  const __m256 t = _mm256_set1_ps(s);
  return {{_mm256_mul_ps(a.v[0], t), _mm256_mul_ps(a.v[1], t)}};
}
inline Lanes add_product(Lanes acc, Lanes a, Lanes b) {
  return {{_mm256_fmadd_ps(a.v[0], b.v[0], acc.v[0]), _mm256_fmadd_ps(a.v[1], b.v[1], acc.v[1])}};
}
inline float sum(Lanes a) {
  const __m256 t = _mm256_add_ps(a.v[0], a.v[1]);
  __m128 h = _mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
}
inline void interleave(Lanes first, Lanes second, float* p) {
  for (int i = 0; i < 2; ++i) {
    const __m256 even = _mm256_permute2f128_ps(first.v[i], second.v[i], 0x20);
    const __m256 odd = _mm256_permute2f128_ps(first.v[i], second.v[i], 0x31);
    const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(even, odd));   // bytes 0, 2 and 1, 3
    const __m256d high = _mm256_castps_pd(_mm256_unpackhi_ps(even, odd));  // bytes 4, 6 and 5, 7
    _mm256_storeu_ps(p + 16 * i, _mm256_castpd_ps(_mm256_permute4x64_pd(low, 0xD8)));
    _mm256_storeu_ps(p + 16 * i + 8, _mm256_castpd_ps(_mm256_permute4x64_pd(high, 0xD8)));
  }
}
// Where decode() puts element `i` of a group: `first` has the even bytes, of each eight their low codes and then their
// high ones.
constexpr int position(int i) { return i / 2 % 2 * kLanes + i / 16 * 8 + i % 2 * 4 + i / 4 % 4; }

#elif defined(__ARM_NEON)

struct Lanes {
  float32x4_t v[4];
};
inline Lanes zero() {
  const float32x4_t z = vdupq_n_f32(0.f);
  return {{z, z, z, z}};
}
inline Lanes load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
inline Lanes widen(int8x16_t twice) {
  const int16x8_t low = vmovl_s8(vget_low_s8(twice)), high = vmovl_s8(vget_high_s8(twice));
  return {{vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), .5f),
           vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))), .5f),
           vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), .5f),
           vmulq_n_f32(vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))), .5f)}};
}
inline void decode(const uint8_t* p, Lanes& even, Lanes& odd) {
  static const int8_t twice[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const int8x16_t table = vld1q_s8(twice);
  const uint8x16_t bytes = vld1q_u8(p);
  even = widen(vqtbl1q_s8(table, vandq_u8(bytes, vdupq_n_u8(15))));
  odd = widen(vqtbl1q_s8(table, vshrq_n_u8(bytes, 4)));
}
inline Lanes two_scales(const float* a, const float* b) {
  const float32x4_t x = vld1q_dup_f32(a), y = vld1q_dup_f32(b);
  return {{x, x, y, y}};
}
inline Lanes multiply(Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i) a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}
inline Lanes scaled(Lanes a, float s) {
  for (int i = 0; i < 4; ++i) a.v[i] = vmulq_n_f32(a.v[i], s);
  return a;
}
inline Lanes add_product(Lanes acc, Lanes a, Lanes b) {
  for (int i = 0; i < 4; ++i) acc.v[i] = vfmaq_f32(acc.v[i], a.v[i], b.v[i]);
  return acc;
}
inline float sum(Lanes a) { return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3]))); }
inline void interleave(Lanes even, Lanes odd, float* p) {
  for (int i = 0; i < 4; ++i) vst2q_f32(p + 8 * i, (float32x4x2_t{{even.v[i], odd.v[i]}}));
}
constexpr int position(int i) { return i % 2 * kLanes + i / 2; }  // where decode() puts element `i` of a group

#else

struct Lanes {
  float v[16];
};
inline Lanes zero() { return {}; }
inline Lanes load(const float* p) {
  Lanes out;
  std::memcpy(out.v, p, sizeof(out.v));
  return out;
}
inline void decode(const uint8_t* p, Lanes& even, Lanes& odd) {
  for (int i = 0; i < 16; ++i) {
    even.v[i] = kE2M1[p[i] & 15];
    odd.v[i] = kE2M1[p[i] >> 4];
  }
}
inline Lanes two_scales(const float* a, const float* b) {
  Lanes out;
  for (int i = 0; i < 16; ++i) out.v[i] = i < 8 ? *a : *b;
  return out;
}
inline Lanes multiply(Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline Lanes scaled(Lanes a, float s) {
  for (int i = 0; i < 16; ++i) a.v[i] *= s;
  return a;
}
inline Lanes add_product(Lanes acc, Lanes a, Lanes b) {
  for (int i = 0; i < 16; ++i) acc.v[i] += a.v[i] * b.v[i];
  return acc;
}
inline float sum(Lanes a) {
  float t = 0.f;
  for (int i = 0; i < 16; ++i) t += a.v[i];
  return t;
}
inline void interleave(Lanes even, Lanes odd, float* p) {
  for (int i = 0; i < 16; ++i) {
    p[2 * i] = even.v[i];
    p[2 * i + 1] = odd.v[i];
  }
}
constexpr int position(int i) { return i % 2 * kLanes + i / 2; }  // where decode() puts element `i` of a group

#endif

struct Weight {
  const uint8_t* codes;
  const uint8_t* block_scales;
  const float* row_scale;
  const float* scale_values;
  int64_t n, padded_k, block;
};

// One row of the weight, group by group; a last group of half the size is completed with zeros.
struct Row {
  const uint8_t* codes;
  const uint8_t* scales;
  const float* values;
  bool two;  // blocks of half a group

  Row(const Weight& w, int64_t row)
      : codes(w.codes + row * w.padded_k / 2),
        scales(w.block_scales + row * w.padded_k / w.block),
        values(w.scale_values),
        two(w.block < kGroup) {}

  Lanes group(int64_t g, Lanes& even, Lanes& odd) const {
    decode(codes + g * (kGroup / 2), even, odd);
    const uint8_t* at = two ? scales + 2 * g : scales + g;
    return two_scales(values + at[0], values + at[two]);
  }
  Lanes half_group(int64_t g, Lanes& even, Lanes& odd) const {
    uint8_t bytes[kGroup / 2] = {};
    std::memcpy(bytes, codes + g * (kGroup / 2), kGroup / 4);
    decode(bytes, even, odd);
    return two_scales(values + scales[2 * g], values + scales[2 * g]);
  }
};

#if defined(__AVX512F__)

constexpr int kStep = wide::kStep;  // x is arranged in steps of so many elements, zeros past the end
constexpr int kFew = 2, kMany = 4;  // rows of the weight in one pass over fewer than four rows of x, or more
constexpr int position(int i) { return wide::position(i); }

#else

constexpr int kStep = kGroup;
constexpr int kFew = 1, kMany = 1;

#endif

// Where the elements of a step are, of the first of R rows of x that are multiplied together: vectors of them in turn.
template <int R>
constexpr std::array<int, kStep> kPlaces = [] {
  std::array<int, kStep> places{};
  for (int i = 0; i < kStep; ++i) places[i] = position(i) / kLanes * kLanes * R + position(i) % kLanes;
  return places;
}();

template <int R, typename T>
void arrange(const T* x, int64_t k, float* to) {
  for (int r = 0; r < R; ++r)
    for (int64_t first = 0; first < k; first += kStep) {
      const T* from = x + r * k + first;
      float* step = to + first * R + r * kLanes;
      const int count = static_cast<int>(std::min<int64_t>(kStep, k - first));
      for (int i = 0; i < count; ++i) step[kPlaces<R>[i]] = static_cast<float>(from[i]);
    }
}

#if defined(__AVX512F__)

// One sum with row `r` of x from the table of scale values: for scales that are NaN or have a sign.
template <int R>
float dot_any(const Weight& w, int64_t row, const float* x, int r) {
  const uint8_t* codes = w.codes + row * w.padded_k / 2;
  const uint8_t* scales = w.block_scales + row * w.padded_k / w.block;
  float total = 0.f;
  for (int64_t first = 0; first < w.padded_k; first += w.block) {
    float part = 0.f;
    for (int64_t i = first; i < first + w.block; ++i)
      part += kE2M1[codes[i / 2] >> i % 2 * 4 & 15] * x[i / kStep * kStep * R + kPlaces<R>[i % kStep] + r * kLanes];
    total += part * w.scale_values[scales[first / w.block]];
  }
  return total;
}

// sums[i][r] = row `row + i` of the weight times row `r` of x.
template <int W, int R>
void dot_rows(const Weight& w, int64_t row, const float* x, float (*sums)[R]) {
  const uint8_t* codes = w.codes + row * w.padded_k / 2;
  const uint8_t* scales = w.block_scales + row * w.padded_k / w.block;
  const auto run = w.block == wide::E4M3::kBlock ? wide::dot<wide::E4M3, W, R> : wide::dot<wide::E8M0, W, R>;
  const int64_t ahead = std::clamp(W * w.padded_k / 2, kAhead, 4 * kAhead);  // the next rows, or what the row has next
  const bool ordinary = run(codes, scales, w.padded_k, x, ahead, sums);
  for (int i = 0; i < W; ++i)
    for (int r = 0; r < R; ++r) {
      if (!ordinary) sums[i][r] = dot_any<R>(w, row + i, x, r);
      sums[i][r] *= w.row_scale[row + i];
    }
}

#else

// sums[0][r] = row `row` of the weight times row `r` of x.
template <int W, int R>
void dot_rows(const Weight& w, int64_t row, const float* x, float (*sums)[R]) {
  const Row weight(w, row);
  const int64_t whole = w.padded_k / kGroup, groups = (w.padded_k + kGroup - 1) / kGroup;
  Lanes even_sum[R], odd_sum[R];
  for (int r = 0; r < R; ++r) even_sum[r] = odd_sum[r] = zero();
  auto add = [&](int64_t g, Lanes scale, Lanes even, Lanes odd) {
    const float* at = x + g * kGroup * R;
    if constexpr (R == 1) {
      Lanes& total = g % 2 ? odd_sum[0] : even_sum[0];
      total = add_product(total, scale, add_product(multiply(even, load(at)), odd, load(at + kLanes)));
    } else {
      even = multiply(even, scale);
      odd = multiply(odd, scale);
      for (int r = 0; r < R; ++r) {
        even_sum[r] = add_product(even_sum[r], even, load(at + r * kLanes));
        odd_sum[r] = add_product(odd_sum[r], odd, load(at + (R + r) * kLanes));
      }
    }
  };
  Lanes even, odd;
  int64_t g = 0;
  for (; g + 1 < whole; g += 2) {
    __builtin_prefetch(weight.codes + g * (kGroup / 2) + kAhead);
    if (g % 32 == 0) __builtin_prefetch(weight.scales + (weight.two ? 2 * g : g) + kAhead / 4);
    Lanes scale = weight.group(g, even, odd);
    add(g, scale, even, odd);
    scale = weight.group(g + 1, even, odd);
    add(g + 1, scale, even, odd);
  }
  for (; g < groups; ++g) {
    const Lanes scale = g < whole ? weight.group(g, even, odd) : weight.half_group(g, even, odd);
    add(g, scale, even, odd);
  }
  for (int r = 0; r < R; ++r) sums[0][r] = (sum(even_sum[r]) + sum(odd_sum[r])) * w.row_scale[row];
}

#endif

// Calls run.operator()<R>(first) for rows `first` to `first + R` of x until all `m` are done.
template <typename F>
void in_parts(int64_t m, const F& run) {
  int64_t first = 0;
  for (; first + 4 <= m; first += 4) run.template operator()<4>(first);
  if (m - first >= 2) {
    run.template operator()<2>(first);
    first += 2;
  }
  if (first < m) run.template operator()<1>(first);
}

// As many rows of the weight as make whole parts of W, from `row` to `end`, with all rows of x; gives the first row left.
template <int W, typename T>
int64_t product_rows(const Weight& w, int64_t row, int64_t end, const float* x, int64_t stride, const T* bias, T* y,
                     int64_t m) {
  for (; row + W <= end; row += W)
    in_parts(m, [&]<int R>(int64_t first) {
      float sums[W][R];
      dot_rows<W, R>(w, row, x + first * stride, sums);
      for (int i = 0; i < W; ++i)
        for (int r = 0; r < R; ++r)
          y[(first + r) * w.n + row + i] = static_cast<T>(sums[i][r] + (bias ? static_cast<float>(bias[row + i]) : 0.f));
    });
  return row;
}

template <typename T>
void product(const Weight& w, const T* x, const T* bias, T* y, int64_t m, int64_t k) {
  const int64_t stride = (w.padded_k + kStep - 1) / kStep * kStep;
  std::vector<float> buffer(m * stride + kLanes);
  float* arranged = buffer.data() + (-(reinterpret_cast<uintptr_t>(buffer.data()) / sizeof(float)) & (kLanes - 1));
  in_parts(m, [&]<int R>(int64_t first) { arrange<R>(x + first * k, k, arranged + first * stride); });
  // Each thread takes the next rows when it is done: cores are not all as fast, nor all free.
  std::atomic<int64_t> next{0};
  const int64_t useful = w.n * w.padded_k * m / kLeastWork + 1;
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), useful), 1, [&](int64_t, int64_t) {
    for (int64_t row; (row = next.fetch_add(kRowsEach)) < w.n;) {
      const int64_t end = std::min(row + kRowsEach, w.n);
      if (m >= 4) row = product_rows<kMany>(w, row, end, arranged, stride, bias, y, m);
      row = product_rows<kFew>(w, row, end, arranged, stride, bias, y, m);
      product_rows<1>(w, row, end, arranged, stride, bias, y, m);
    }
  });
}

inline uint16_t to_bfloat16(float value) {  // finite values, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float to_float(float value, float*) { return value; }
inline uint16_t to_float(float value, uint16_t*) { return to_bfloat16(value); }

template <typename T>
void dequantize(const Weight& w, T* out, int64_t k) {
  const int64_t whole = w.padded_k / kGroup;
  at::parallel_for(0, w.n, kRowsEach, [&](int64_t begin, int64_t end) {
    alignas(64) float group[kGroup];
    for (int64_t row = begin; row < end; ++row) {
      const Row weight(w, row);
      for (int64_t g = 0; g * kGroup < k; ++g) {
        Lanes even, odd;
        const Lanes scale = g < whole ? weight.group(g, even, odd) : weight.half_group(g, even, odd);
        const float row_scale = w.row_scale[row];
        interleave(scaled(multiply(even, scale), row_scale), scaled(multiply(odd, scale), row_scale), group);
        T* to = out + row * k + g * kGroup;
        const int64_t count = k - g * kGroup < kGroup ? k - g * kGroup : kGroup;
        if (count == kGroup) {
          for (int i = 0; i < kGroup; ++i) to[i] = to_float(group[i], static_cast<T*>(nullptr));
        } else {
          for (int64_t i = 0; i < count; ++i) to[i] = to_float(group[i], static_cast<T*>(nullptr));
        }
      }
    }
  });
}

}  // namespace

extern "C" {

// y [m, n] = x [m, k] @ weight.T + bias, summed in float32. x, bias and y are float32 (type 0), bfloat16 (1) or float16
// (2); bias may be null. `block` is 16 for E4M3 scales and 32 for E8M0.
void vblackwell_fp4_product(const void* x, const uint8_t* codes, const uint8_t* block_scales, const float* row_scale,
                            const float* scale_values, const void* bias, void* y, int64_t type, int64_t m, int64_t n,
                            int64_t k, int64_t padded_k, int64_t block) {
  const Weight w{codes, block_scales, row_scale, scale_values, n, padded_k, block};
  auto run = [&]<typename T>(T*) {
    product(w, static_cast<const T*>(x), static_cast<const T*>(bias), static_cast<T*>(y), m, k);
  };
  if (type == 0)
    run(static_cast<float*>(nullptr));
  else if (type == 1)
    run(static_cast<c10::BFloat16*>(nullptr));
  else
    run(static_cast<c10::Half*>(nullptr));
}

// out [n, k] = the weight in float32, or in bfloat16 where `half` is not zero.
void vblackwell_fp4_dequantize(const uint8_t* codes, const uint8_t* block_scales, const float* row_scale,
                               const float* scale_values, void* out, int64_t n, int64_t k, int64_t padded_k,
                               int64_t block, int64_t half) {
  const Weight w{codes, block_scales, row_scale, scale_values, n, padded_k, block};
  if (half)
    dequantize(w, static_cast<uint16_t*>(out), k);
  else
    dequantize(w, static_cast<float*>(out), k);
}

}  // extern "C"
