/* The loops over pixels for any machine, as in Resample.c and Geometry.c of Pillow, for RGB. */

#include <string.h>

#include "pixels.h"

static uint8_t clip8(int sum) {
  sum >>= BITS;
  return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

/* One pixel from `count` pixels at a distance of `step` bytes. */
static void sum_up(const uint8_t *in, size_t step, const int32_t *k, int count, uint8_t *out) {
  int r = 1 << (BITS - 1), g = r, b = r;
  for (int i = 0; i < count; i++, in += step) {
    r += in[0] * k[i];
    g += in[1] * k[i];
    b += in[2] * k[i];
  }
  out[0] = clip8(r);
  out[1] = clip8(g);
  out[2] = clip8(b);
  out[3] = 255;
}

static void resize_rows(const uint8_t *in, int from, int rows, const struct taps *taps, uint8_t *out) {
  for (int y = 0; y < rows; y++, in += 4 * (size_t)from)
    for (int x = 0; x < taps->length; x++, out += 4)
      sum_up(in + 4 * (size_t)taps->first[x], 4, taps->k + (size_t)x * taps->size, taps->count[x], out);
}

static void resize_columns(const uint8_t *in, int width, const struct taps *taps, uint8_t *out) {
  size_t stride = 4 * (size_t)width;
  for (int y = 0; y < taps->length; y++)
    for (int x = 0; x < width; x++, out += 4)
      sum_up(in + taps->first[y] * stride + 4 * (size_t)x, stride, taps->k + (size_t)y * taps->size,
             taps->count[y], out);
}

/* The value at the distance `d` after at[1] of a row. If d is 0, as in all pixels of some shears and
 * translations, the other terms are 0. */
static inline double along(const uint8_t *row, const int at[4], double d, int filter) {
  int v2 = row[at[1]];
  if (d == 0.0) return v2;
  int v3 = row[at[2]];
  if (filter == BILINEAR) return v2 + (v3 - v2) * d;
  int v1 = row[at[0]], v4 = row[at[3]];
  return v2 + d * ((v3 - v1) + d * ((2 * (v1 - v2) + v3 - v4) + d * (v2 - v1 - v3 + v4)));
}

static void transform(const uint8_t *in, int width, int height, const double a[6], uint32_t fill, int filter,
                      uint8_t *out) {
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
      int at[4];
      for (int i = 0; i < 4; i++) at[i] = 4 * within(column - 1 + i, width);
      const uint8_t *line1 = in + stride * within(row - 1, height),
                    *line2 = in + stride * within(row, height);
      const uint8_t *line3 = in + stride * within(row + 1, height),
                    *line4 = in + stride * within(row + 2, height);
      for (int band = 0; band < 3; band++) {
        double v2 = along(line2 + band, at, dx, filter);
        if (dy != 0.0) {
          double v3 = along(line3 + band, at, dx, filter);
          if (filter == BILINEAR) v2 = v2 + (v3 - v2) * dy;
          else {
            double v1 = along(line1 + band, at, dx, filter), v4 = along(line4 + band, at, dx, filter);
            v2 = v2 + dy * ((v3 - v1) + dy * ((2 * (v1 - v2) + v3 - v4) + dy * (v2 - v1 - v3 + v4)));
          }
        }
        out[band] = v2 <= 0.0 ? 0 : v2 >= 255.0 ? 255 : (uint8_t)v2;
      }
      out[3] = 255;
    }
}

const struct loops scalar = {resize_rows, resize_columns, transform};
