/* The loops of scalar.c with AVX2: four bytes of a pixel at a time. Called only if the machine has AVX2. */

#include "pixels.h"

#ifdef __x86_64__
#include <immintrin.h>
#include <string.h>

enum {
  HALF = 1 << (BITS - 1)
}; /* so that dropping the low bits rounds */

#define AVX2 __attribute__((target("avx2"))) /* without FMA, which rounds differently */

AVX2 static inline __m128i load4(const uint8_t *in) {
  int32_t bytes;
  memcpy(&bytes, in, 4);
  return _mm_cvtepu8_epi32(_mm_cvtsi32_si128(bytes));
}

AVX2 static inline __m256i load8(const uint8_t *in) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)in));
}

/* Clip to 0..255. */
AVX2 static inline void store4(uint8_t *out, __m128i values) {
  values = _mm_packs_epi32(values, values);
  int32_t bytes = _mm_cvtsi128_si32(_mm_packus_epi16(values, values));
  memcpy(out, &bytes, 4);
}

AVX2 static inline void store8(uint8_t *out, __m256i values) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  _mm_storel_epi64((__m128i *)out, _mm_packus_epi16(words, words));
}

/* `n` rows at once, so that coefficients are loaded only once for them. */
AVX2 static inline __attribute__((always_inline)) void resize_n_rows(int n, const uint8_t *in, int from,
                                                                     const struct taps *taps, uint8_t *out) {
  const __m256i first_two = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1),
                last_two = _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3);
  for (int x = 0; x < taps->length; x++, out += 4) {
    const int32_t *k = taps->k + (size_t)x * taps->size;
    const uint8_t *pixel = in + 4 * (size_t)taps->first[x];
    __m256i sums[4];
    for (int row = 0; row < n; row++) sums[row] = _mm256_setr_epi32(HALF, HALF, HALF, HALF, 0, 0, 0, 0);
    for (int i = 0; i < taps->count[x]; i += 4, pixel += 16) { /* k is padded with zeros, `in` with bytes */
      __m256i four = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)(k + i)));
      __m256i k_first = _mm256_permutevar8x32_epi32(four, first_two),
              k_last = _mm256_permutevar8x32_epi32(four, last_two);
      for (int row = 0; row < n; row++) {
        const uint8_t *pixels = pixel + 4 * (size_t)from * row;
        sums[row] = _mm256_add_epi32(sums[row], _mm256_mullo_epi32(load8(pixels), k_first));
        sums[row] = _mm256_add_epi32(sums[row], _mm256_mullo_epi32(load8(pixels + 8), k_last));
      }
    }
    for (int row = 0; row < n; row++) {
      __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums[row]), _mm256_extracti128_si256(sums[row], 1));
      store4(out + 4 * (size_t)taps->length * row, _mm_srai_epi32(sum, BITS));
    }
  }
}

AVX2 static void resize_rows(const uint8_t *in, int from, int rows, const struct taps *taps, uint8_t *out) {
  int y = 0;
  for (; y + 4 <= rows; y += 4)
    resize_n_rows(4, in + 4 * (size_t)from * y, from, taps, out + 4 * (size_t)taps->length * y);
  for (; y < rows; y++)
    resize_n_rows(1, in + 4 * (size_t)from * y, from, taps, out + 4 * (size_t)taps->length * y);
}

AVX2 static void resize_columns(const uint8_t *in, int width, const struct taps *taps, uint8_t *out) {
  const __m256i half = _mm256_set1_epi32(HALF);
  size_t stride = 4 * (size_t)width;
  for (int y = 0; y < taps->length; y++, out += stride) {
    const int32_t *k = taps->k + (size_t)y * taps->size;
    const uint8_t *top = in + taps->first[y] * stride;
    size_t x = 0;
    for (; x + 32 <= stride; x += 32) {
      __m256i a = half, b = half, c = half, d = half;
      for (int i = 0; i < taps->count[y]; i++) {
        const uint8_t *pixel = top + i * stride + x;
        __m256i factor = _mm256_set1_epi32(k[i]);
        a = _mm256_add_epi32(a, _mm256_mullo_epi32(load8(pixel), factor));
        b = _mm256_add_epi32(b, _mm256_mullo_epi32(load8(pixel + 8), factor));
        c = _mm256_add_epi32(c, _mm256_mullo_epi32(load8(pixel + 16), factor));
        d = _mm256_add_epi32(d, _mm256_mullo_epi32(load8(pixel + 24), factor));
      }
      store8(out + x, _mm256_srai_epi32(a, BITS));
      store8(out + x + 8, _mm256_srai_epi32(b, BITS));
      store8(out + x + 16, _mm256_srai_epi32(c, BITS));
      store8(out + x + 24, _mm256_srai_epi32(d, BITS));
    }
    for (; x < stride; x += 4) {
      __m128i sum = _mm256_castsi256_si128(half);
      for (int i = 0; i < taps->count[y]; i++)
        sum = _mm_add_epi32(sum, _mm_mullo_epi32(load4(top + i * stride + x), _mm_set1_epi32(k[i])));
      store4(out + x, _mm_srai_epi32(sum, BITS));
    }
  }
}

typedef int32_t i32x4 __attribute__((vector_size(16)));
typedef double f64x4 __attribute__((vector_size(32)));

AVX2 static inline f64x4 doubles(i32x4 values) { return (f64x4)_mm256_cvtepi32_pd((__m128i)values); }

/* The value at the distance `d` after `column` of a row. Differences of bytes are exact in integers. */
AVX2 static inline f64x4 along(const uint8_t *row, int column, int width, double d, int filter) {
  i32x4 v2 = (i32x4)load4(row + 4 * within(column, width));
  if (d == 0.0) return doubles(v2);
  i32x4 v3 = (i32x4)load4(row + 4 * within(column + 1, width));
  if (filter == BILINEAR) return doubles(v2) + doubles(v3 - v2) * d;
  i32x4 v1 = (i32x4)load4(row + 4 * within(column - 1, width)),
        v4 = (i32x4)load4(row + 4 * within(column + 2, width));
  return doubles(v2) +
         d * (doubles(v3 - v1) + d * (doubles(2 * (v1 - v2) + v3 - v4) + d * doubles(v2 - v1 - v3 + v4)));
}

AVX2 static void transform(const uint8_t *in, int width, int height, const double a[6], uint32_t fill,
                           int filter, uint8_t *out) {
  size_t stride = 4 * (size_t)width;
  for (int y = 0; y < height; y++)
    for (int x = 0; x < width; x++, out += 4) {
      struct origin from;
      if (!origin_of(&from, a, x, y, width, height)) {
        memcpy(out, &fill, 4);
        continue;
      }
      int column = from.column, row = from.row;
      double dx = from.dx, dy = from.dy;
      f64x4 v2 = along(in + stride * within(row, height), column, width, dx, filter);
      if (dy != 0.0) {
        f64x4 v3 = along(in + stride * within(row + 1, height), column, width, dx, filter);
        if (filter == BILINEAR) v2 = v2 + (v3 - v2) * dy;
        else {
          f64x4 v1 = along(in + stride * within(row - 1, height), column, width, dx, filter);
          f64x4 v4 = along(in + stride * within(row + 2, height), column, width, dx, filter);
          v2 = v2 + dy * ((v3 - v1) + dy * ((2 * (v1 - v2) + v3 - v4) + dy * (v2 - v1 - v3 + v4)));
        }
      }
      store4(out, _mm256_cvttpd_epi32((__m256d)v2));
    }
}

const struct loops avx2 = {resize_rows, resize_columns, transform};
#else
const struct loops avx2 = {0};
#endif
