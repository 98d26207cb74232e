/* The loops over pixels as any machine runs them: Resample.c and Geometry.c of Pillow, for RGB. */

#include <math.h>
#include <string.h>

#include "pixels.h"

static uint8_t clip8(int sum) {
  sum >>= BITS;
  return sum < 0 ? 0 : sum > 255 ? 255 : sum;
}

/* One pixel from `count` pixels that lie `step` bytes apart. */
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
      sum_up(in + taps->first[y] * stride + 4 * (size_t)x, stride, taps->k + (size_t)y * taps->size, taps->count[y], out);
}

static int within(int i, int length) { return i < 0 ? 0 : i < length ? i : length - 1; }

static double cubic(double v1, double v2, double v3, double v4, double d) {
  double p2 = v3 - v1, p3 = 2 * (v1 - v2) + v3 - v4, p4 = v2 - v1 - v3 + v4;
  return v2 + d * (p2 + d * (p3 + d * p4));
}

/* Where the distance to a row or column is 0, which it is throughout for shears and translations, all others vanish from the sum. */
static void transform(const uint8_t *in, int width, int height, const double a[6], uint32_t fill, int filter, uint8_t *out) {
  for (int y = 0; y < height; y++)
    for (int x = 0; x < width; x++, out += 4) {
      double left = a[0] * (x + 0.5) + a[1] * (y + 0.5) + a[2], top = a[3] * (x + 0.5) + a[4] * (y + 0.5) + a[5];
      if (!(left >= 0.0 && left < width && top >= 0.0 && top < height)) {
        memcpy(out, &fill, 4);
        continue;
      }
      int column = (int)floor(left -= 0.5), row = (int)floor(top -= 0.5);
      double dx = left - column, dy = top - row;
      size_t at[4];
      const uint8_t *line[4];
      for (int i = 0; i < 4; i++) {
        at[i] = 4 * (size_t)within(column - 1 + i, width);
        line[i] = in + 4 * (size_t)width * within(row - 1 + i, height);
      }
      for (int band = 0; band < 3; band++) {
        double v[4];
        for (int i = dy == 0.0 ? 1 : 0; i < (dy == 0.0 ? 2 : 4); i++) {
          const uint8_t *from = line[i] + band;
          if (dx == 0.0)
            v[i] = from[at[1]];
          else if (filter == BILINEAR)
            v[i] = from[at[1]] + (from[at[2]] - from[at[1]]) * dx;
          else
            v[i] = cubic(from[at[0]], from[at[1]], from[at[2]], from[at[3]], dx);
        }
        double value = dy == 0.0 ? v[1] : filter == BILINEAR ? v[1] + (v[2] - v[1]) * dy : cubic(v[0], v[1], v[2], v[3], dy);
        out[band] = value <= 0.0 ? 0 : value >= 255.0 ? 255 : (uint8_t)value;
      }
      out[3] = 255;
    }
}

const struct loops scalar = {resize_rows, resize_columns, transform};
