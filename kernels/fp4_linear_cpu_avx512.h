// Sums of rows of x with rows of an FP4 weight, AVX-512.
//
// A vector of 64 bytes of codes is 16 words of eight codes: word `i` shifted right by four times `j` has code `8 i + j`
// in its low bits, where a table look-up wants it. So 128 elements decode with eight look-ups and seven shifts. x is
// arranged for that once: of each 128 elements those with `j` 0 first, then those with `j` 1. Scales go in after the sum
// over `j`, since the eight codes of a word share theirs. The including file has kE2M1 and kLanes.

namespace wide {

constexpr int kStep = 256;  // elements of a row that are taken at once, whose scales are decoded together

// Where element `i` of a step of x is kept.
constexpr int position(int i) { return i / 128 * 128 + i % 8 * kLanes + i % 128 / 8; }

// E4M3 scales of blocks of 16: the byte's exponent and mantissa are those of a float16, 256 times too small.
struct E4M3 {
  static constexpr int kBlock = 16, kLargest = 0x7E;
  static constexpr float kFactor = 256.f;
  static __m512 decode(__m128i bytes) { return _mm512_cvtph_ps(_mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7)); }
};

// E8M0 scales of blocks of 32: the exponent of a float32; the smallest is subnormal.
struct E8M0 {
  static constexpr int kBlock = 32, kLargest = 0xFE;
  static constexpr float kFactor = 1.f;
  static __m512 decode(__m128i bytes) {
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23);
    return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(0x00400000)));
  }
};

// sums[i][r] = row `i` of the weight times row `r` of x, without the weight's row scale. False if a scale is not an
// ordinary one (NaN, or with a sign), which decode() does not take. `ahead`: bytes of codes
// to ask memory for in advance.
template <typename Scale, int W, int R>
bool dot(const uint8_t* codes, const uint8_t* scales, int64_t padded_k, const float* x, int64_t ahead, float (*sums)[R]) {
  constexpr int kEach = 128 / Scale::kBlock;  // scales of 128 elements
  const int64_t code_stride = padded_k / 2, scale_stride = padded_k / Scale::kBlock;
  const __m512 table = _mm512_load_ps(kE2M1);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i spread = _mm512_srli_epi32(lane, kEach == 8 ? 1 : 2);
  __m512 totals[W][R];
  __m128i seen = _mm_setzero_si128();
  for (auto& row : totals)
    for (auto& total : row) total = _mm512_setzero_ps();

  auto half = [&](const __m512i (&packed)[W], const __m512 (&scale)[W], const float* at) {
    __m512 parts[W][R];
    for (int r = 0; r < R; ++r) {
      const __m512 first = _mm512_loadu_ps(at + r * kLanes);
      for (int i = 0; i < W; ++i) parts[i][r] = _mm512_mul_ps(_mm512_permutexvar_ps(packed[i], table), first);
    }
#pragma GCC unroll 8
    for (int j = 1; j < 8; ++j) {
      __m512 weight[W];
      for (int i = 0; i < W; ++i) weight[i] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed[i], 4 * j), table);
      for (int r = 0; r < R; ++r) {
        const __m512 value = _mm512_loadu_ps(at + (j * R + r) * kLanes);
        for (int i = 0; i < W; ++i) parts[i][r] = _mm512_fmadd_ps(weight[i], value, parts[i][r]);
      }
    }
    for (int i = 0; i < W; ++i)
      for (int r = 0; r < R; ++r) totals[i][r] = _mm512_fmadd_ps(parts[i][r], scale[i], totals[i][r]);
  };

  int64_t at = 0;
  for (; at + kStep <= padded_k; at += kStep) {
    __m512i packed[W];
    __m512 decoded[W], scale[W];
    for (int i = 0; i < W; ++i) {
      const uint8_t* from = codes + i * code_stride + at / 2;
      __builtin_prefetch(from + ahead);
      __builtin_prefetch(from + ahead + 64);
      packed[i] = _mm512_loadu_si512(from);
      const auto* bytes = reinterpret_cast<const __m128i*>(scales + i * scale_stride + at / Scale::kBlock);
      const __m128i read = kEach == 8 ? _mm_loadu_si128(bytes) : _mm_loadl_epi64(bytes);
      seen = _mm_max_epu8(seen, read);
      decoded[i] = Scale::decode(read);
      scale[i] = _mm512_permutexvar_ps(spread, decoded[i]);
    }
    half(packed, scale, x + at * R);
    for (int i = 0; i < W; ++i) {
      packed[i] = _mm512_loadu_si512(codes + i * code_stride + at / 2 + 64);
      scale[i] = _mm512_permutexvar_ps(_mm512_add_epi32(spread, _mm512_set1_epi32(kEach)), decoded[i]);
    }
    half(packed, scale, x + (at + kStep / 2) * R);
  }
  if (at < padded_k) {
    const int64_t left = padded_k - at;
    const auto of_scales = static_cast<__mmask16>((1u << left / Scale::kBlock) - 1);
    const auto of_codes = static_cast<uint32_t>((uint64_t{1} << left / 8) - 1);
    __m512 decoded[W];
    for (int i = 0; i < W; ++i) {
      const __m128i read = _mm_maskz_loadu_epi8(of_scales, scales + i * scale_stride + at / Scale::kBlock);
      seen = _mm_max_epu8(seen, read);
      decoded[i] = Scale::decode(read);
    }
    for (int h = 0; h < 2; ++h) {
      __m512i packed[W];
      __m512 scale[W];
      for (int i = 0; i < W; ++i) {
        const uint8_t* from = codes + i * code_stride + at / 2 + 64 * h;
        packed[i] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(of_codes >> 16 * h), from);
        scale[i] = _mm512_permutexvar_ps(_mm512_add_epi32(spread, _mm512_set1_epi32(h * kEach)), decoded[i]);
      }
      half(packed, scale, x + (at + h * kStep / 2) * R);
    }
  }
  for (int i = 0; i < W; ++i)
    for (int r = 0; r < R; ++r) sums[i][r] = _mm512_reduce_add_ps(totals[i][r]) * Scale::kFactor;
  const __m128i above = _mm_subs_epu8(seen, _mm_set1_epi8(static_cast<char>(Scale::kLargest)));
  return _mm_testz_si128(above, above);
}

}  // namespace wide
