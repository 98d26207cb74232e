/* Decodes a box of a JPEG with the libjpeg-turbo of Pillow; only the rows and columns of the box. */

#include <dlfcn.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The library has the layout of libjpeg 6.2, and rejects callers with another. These headers may be for
 * another version, for example 8 on Ubuntu. */
#include <jconfig.h>
#undef JPEG_LIB_VERSION
#define JPEG_LIB_VERSION 62
#define JCONFIG_INCLUDED
#include <jpeglib.h>

#include "pixels.h"

static struct {
  struct jpeg_error_mgr *(*std_error)(struct jpeg_error_mgr *);
  void (*create)(j_decompress_ptr, int, size_t);
  void (*destroy)(j_decompress_ptr);
  void (*mem_src)(j_decompress_ptr, const unsigned char *, unsigned long);
  int (*read_header)(j_decompress_ptr, boolean);
  boolean (*start)(j_decompress_ptr);
  boolean (*multiple_scans)(j_decompress_ptr);
  void (*crop)(j_decompress_ptr, JDIMENSION *, JDIMENSION *);
  JDIMENSION (*skip)(j_decompress_ptr, JDIMENSION);
  JDIMENSION (*read)(j_decompress_ptr, JSAMPARRAY, JDIMENSION);
} jpeg;

int use_libjpeg(const char *path) {
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  return !(library && (*(void **)&jpeg.std_error = dlsym(library, "jpeg_std_error")) &&
           (*(void **)&jpeg.create = dlsym(library, "jpeg_CreateDecompress")) &&
           (*(void **)&jpeg.destroy = dlsym(library, "jpeg_destroy_decompress")) &&
           (*(void **)&jpeg.mem_src = dlsym(library, "jpeg_mem_src")) &&
           (*(void **)&jpeg.read_header = dlsym(library, "jpeg_read_header")) &&
           (*(void **)&jpeg.start = dlsym(library, "jpeg_start_decompress")) &&
           (*(void **)&jpeg.multiple_scans = dlsym(library, "jpeg_has_multiple_scans")) &&
           (*(void **)&jpeg.crop = dlsym(library, "jpeg_crop_scanline")) &&
           (*(void **)&jpeg.skip = dlsym(library, "jpeg_skip_scanlines")) &&
           (*(void **)&jpeg.read = dlsym(library, "jpeg_read_scanlines")));
}

struct decoder {
  struct jpeg_decompress_struct info; /* must be first: libjpeg passes a pointer to it to fail() */
  struct jpeg_error_mgr errors;
  jmp_buf failed;
};

static void fail(j_common_ptr info) { longjmp(((struct decoder *)info)->failed, 1); }
static void stay_silent(j_common_ptr info) { (void)info; }

/* 8 bits, Huffman, gray or YCbCr 4:4:4, 4:2:2, 4:2:0, and not too large: the tests compare these with Pillow.
 */
static int is_plain(const struct jpeg_decompress_struct *info) {
  const jpeg_component_info *component = info->comp_info;
  if ((uint64_t)info->image_width * info->image_height > LARGEST || info->data_precision != 8 ||
      info->arith_code)
    return 0;
  if (info->num_components == 1) return info->jpeg_color_space == JCS_GRAYSCALE;
  if (info->num_components != 3 || info->jpeg_color_space != JCS_YCbCr) return 0;
  for (int i = 1; i < 3; i++)
    if (component[i].h_samp_factor != 1 || component[i].v_samp_factor != 1) return 0;
  return component[0].h_samp_factor <= 2 && component[0].v_samp_factor <= component[0].h_samp_factor;
}

/* Whether the file has every bit of every coefficient. If a progressive file lacks some, libjpeg smooths
 * blocks with pixels outside of our margin. */
static int is_complete(const struct jpeg_decompress_struct *info) {
  if (!info->progressive_mode || !info->coef_bits) return 1;
  for (int component = 0; component < info->num_components; component++)
    for (int i = 0; i < DCTSIZE2; i++)
      if (info->coef_bits[component][i] != 0) return 0;
  return 1;
}

/* Whether only compressed data and the end marker follow the last decoded row, so that Pillow would raise no
 * error. */
static int ends_well(const struct jpeg_decompress_struct *info) {
  const uint8_t *at = info->src->next_input_byte, *end = at + info->src->bytes_in_buffer;
  int marker = info->unread_marker;
  while (marker == 0 || (marker >= JPEG_RST0 && marker <= JPEG_RST0 + 7)) {
    at = at < end ? memchr(at, 0xFF, end - at) : NULL;
    while (at && at < end && *at == 0xFF) at++;
    if (!at || at == end) return 0;
    marker = *at++;
  }
  return marker == JPEG_EOI;
}

/* Returns OK or NOT_OURS. */
int decode(const uint8_t *data, size_t size, struct box box, uint8_t *out) {
  struct decoder decoder;
  struct jpeg_decompress_struct *info = &decoder.info;
  size_t length = 4 * (size_t)(box.right - box.left);
  memset(&decoder, 0, sizeof decoder);
  info->err = jpeg.std_error(&decoder.errors);
  decoder.errors.error_exit = fail;
  decoder.errors.output_message = stay_silent;
  if (setjmp(decoder.failed)) goto not_ours; /* libjpeg owns all memory; it is freed below */

  jpeg.create(info, JPEG_LIB_VERSION, sizeof *info);
  jpeg.mem_src(info, data, size);
  if (jpeg.read_header(info, TRUE) != JPEG_HEADER_OK || !is_plain(info)) goto not_ours;
  if (box.right > info->image_width || box.bottom > info->image_height) goto not_ours;
  info->out_color_space = JCS_EXT_RGBX;
  if (!jpeg.start(info) || !is_complete(info)) goto not_ours;

  /* Chroma is interpolated between neighbours: two pixels more on each side, which the library widens to
   * whole blocks. */
  JDIMENSION left = box.left < 2 ? 0 : box.left - 2;
  JDIMENSION right = box.right + 2 > info->image_width ? info->image_width : box.right + 2;
  JDIMENSION width = right - left;
  jpeg.crop(info, &left, &width);
  JSAMPARRAY row = info->mem->alloc_sarray((j_common_ptr)info, JPOOL_IMAGE, 4 * info->output_width, 1);
  if (box.top && jpeg.skip(info, box.top) != box.top) goto not_ours;
  for (JDIMENSION y = 0; y < box.bottom - box.top; y++) {
    if (jpeg.read(info, row, 1) != 1) goto not_ours;
    memcpy(out + y * length, row[0] + 4 * (size_t)(box.left - left), length);
  }
  /* One warning, such as for a premature end, is enough to stop. All scans have been read at this point. */
  if (decoder.errors.num_warnings || !(jpeg.multiple_scans(info) || ends_well(info))) goto not_ours;
  jpeg.destroy(info);
  return OK;

not_ours:
  jpeg.destroy(info);
  return NOT_OURS;
}
