/* Pillow's resampling (Resample.c): coefficients in doubles, rounded to integers of 22 bits; two passes with
 * bytes between them. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "pixels.h"

static double bicubic(double x) {
  x = fabs(x);
  if (x < 1.0) return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * -0.5;
  return 0.0;
}

static double bilinear(double x) {
  x = fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

static void free_taps(struct taps *taps) {
  free(taps->first);
  free(taps->count);
  free(taps->k);
}

/* The coefficients of `from` inputs for each of `length` outputs. Returns OK or NO_MEMORY; call free_taps in
 * both cases. */
static int find_taps(struct taps *taps, int from, int length, int filter) {
  double scale = (double)from / length, stretch = scale < 1.0 ? 1.0 : scale, inverse = 1.0 / stretch;
  double support = (filter == BICUBIC ? 2.0 : 1.0) * stretch;
  taps->length = length;
  taps->size = ((int)ceil(support) * 2 + 1 + 3) / 4 * 4;
  taps->first = malloc(length * sizeof(int));
  taps->count = malloc(length * sizeof(int));
  taps->k = calloc((size_t)length * taps->size, sizeof(int32_t));
  double *weights = malloc(taps->size * sizeof(double));
  if (!taps->first || !taps->count || !taps->k || !weights) {
    free(weights);
    return NO_MEMORY;
  }
  for (int i = 0; i < length; i++) {
    double centre = (i + 0.5) * scale, sum = 0.0;
    int first = (int)(centre - support + 0.5), last = (int)(centre + support + 0.5);
    if (first < 0) first = 0;
    if (last > from) last = from;
    for (int j = 0; j < last - first; j++) {
      double x = (j + first - centre + 0.5) * inverse;
      weights[j] = filter == BICUBIC ? bicubic(x) : bilinear(x);
      sum += weights[j];
    }
    for (int j = 0; j < last - first; j++) {
      double weight = (sum != 0.0 ? weights[j] / sum : weights[j]) * (1 << BITS);
      taps->k[(size_t)i * taps->size + j] = (int)(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    taps->first[i] = first;
    taps->count[i] = last - first;
  }
  free(weights);
  return OK;
}

/* As in Pillow, a pass that would change nothing is skipped. Returns OK or NO_MEMORY. */
int resample(const uint8_t *in, int from_width, int from_height, int width, int height, struct how how,
             uint8_t *out) {
  const struct loops *loops = how.simd ? &avx2 : &scalar;
  int wide = from_width != width, high = from_height != height, status = OK;
  struct taps across = {0}, down = {0};
  uint8_t *between = NULL;
  if (wide) status |= find_taps(&across, from_width, width, how.filter);
  if (high) status |= find_taps(&down, from_height, height, how.filter);
  if (wide && high) {
    between = malloc(4 * (how.vertical_first ? (size_t)from_width * height : (size_t)width * from_height) +
                     PADDING);
    if (!between) status = NO_MEMORY;
  }
  if (status != OK)
    ; /* only the memory must be freed */
  else if (wide && high && how.vertical_first) {
    loops->resize_columns(in, from_width, &down, between);
    loops->resize_rows(between, from_width, height, &across, out);
  } else if (wide && high) {
    loops->resize_rows(in, from_width, from_height, &across, between);
    loops->resize_columns(between, width, &down, out);
  } else if (wide) loops->resize_rows(in, from_width, height, &across, out);
  else if (high) loops->resize_columns(in, width, &down, out);
  else memcpy(out, in, 4 * (size_t)width * height);
  free(between);
  free_taps(&across);
  free_taps(&down);
  return status;
}
