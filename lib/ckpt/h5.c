#include "ckpt/h5.h"
#include "base/err.h"

#include <hdf5.h>
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Small datasets lie side by side; those of ALIGN_FROM bytes begin on a page, for direct writes. */
enum { ALIGN_FROM = 65536, ALIGN_TO = 4096, LONGEST_PATH = CKPT_MAX_KIND + CKPT_MAX_NAME + 96 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void h5_enter(void)
{
	static bool begun;
	pthread_mutex_lock(&lock);
	if (!begun) {
		H5dont_atexit();
		H5open();
		H5PLset_loading_state(0);
		begun = true;
	}
	H5Eset_auto2(H5E_DEFAULT, NULL, NULL); /* per thread in thread-safe builds */
}

static void h5_leave(void)
{
	H5Eclear2(H5E_DEFAULT);
	pthread_mutex_unlock(&lock);
}

/* libhdf5 has no floats of two bytes: an f32 with fewer bits of mantissa, and of exponent; readers see
 * ordinary floats. */
static hid_t half_type(size_t mantissa_bits)
{
	size_t exponent_bits = 15 - mantissa_bits, bias = ((size_t)1 << (exponent_bits - 1)) - 1;
	hid_t t = H5Tcopy(H5T_IEEE_F32LE);
	if (t < 0 || H5Tset_fields(t, 15, mantissa_bits, exponent_bits, 0, mantissa_bits) < 0 ||
	    H5Tset_size(t, 2) < 0 || H5Tset_ebias(t, bias) < 0) {
		H5Tclose(t);
		return -1;
	}
	return t;
}

/* NULL: made by half_type. */
static const hid_t *const types[DT_COUNT] = {[DT_f32] = &H5T_IEEE_F32LE_g,
                                             [DT_bf16] = NULL,
                                             [DT_f16] = NULL,
                                             [DT_f64] = &H5T_IEEE_F64LE_g,
                                             [DT_i32] = &H5T_STD_I32LE_g,
                                             [DT_i64] = &H5T_STD_I64LE_g};

static hid_t dtype_open(enum dtype t)
{
	return types[t] ? H5Tcopy(*types[t]) : half_type(t == DT_bf16 ? 7 : 10);
}

/* Virtual datasets know no scalars, so a scalar is shown as one element, in shards as well. */
static hid_t space_open(int nd, const int64_t *dims)
{
	hsize_t d[CKPT_MAX_DIM] = {1};
	for (int i = 0; i < nd; i++)
		d[i] = (hsize_t)dims[i];
	return H5Screate_simple(nd ? nd : 1, d, NULL);
}

/* Creation properties without times of writing: equal tensors make equal files. */
static hid_t timeless(hid_t of_class)
{
	hid_t properties = H5Pcreate(of_class);
	if (properties >= 0 && H5Pset_obj_track_times(properties, 0) >= 0)
		return properties;
	H5Pclose(properties);
	return -1;
}

static hid_t file_create(const char *path, H5F_libver_t version, size_t metadata_bytes)
{
	hid_t file = -1, fapl = H5Pcreate(H5P_FILE_ACCESS), fcpl = timeless(H5P_FILE_CREATE);
	if (fapl >= 0 && fcpl >= 0 && H5Pset_libver_bounds(fapl, version, version) >= 0 &&
	    H5Pset_alignment(fapl, ALIGN_FROM, ALIGN_TO) >= 0 &&
	    H5Pset_meta_block_size(fapl, metadata_bytes) >= 0 &&
	    H5Pset_fclose_degree(fapl, H5F_CLOSE_STRONG) >= 0)
		file = H5Fcreate(path, H5F_ACC_EXCL, fcpl, fapl);
	H5Pclose(fcpl);
	H5Pclose(fapl);
	return file;
}

/* The group of a kind, made at its first use. */
static hid_t group_open(hid_t file, const char *kind)
{
	if (H5Lexists(file, kind, H5P_DEFAULT) > 0)
		return H5Gopen2(file, kind, H5P_DEFAULT);
	hid_t gcpl = timeless(H5P_GROUP_CREATE);
	hid_t group = gcpl >= 0 ? H5Gcreate2(file, kind, H5P_DEFAULT, gcpl, H5P_DEFAULT) : -1;
	H5Pclose(gcpl);
	return group;
}

static hid_t dataset_create(hid_t file, const char *kind, const char *name, enum dtype dtype, int nd,
                            const int64_t *dims, hid_t dcpl)
{
	hid_t type = dtype_open(dtype), space = space_open(nd, dims), group = group_open(file, kind),
	      set = -1;
	if (type >= 0 && space >= 0 && group >= 0)
		set = H5Dcreate2(group, name, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
	H5Gclose(group);
	H5Sclose(space);
	H5Tclose(type);
	return set;
}

/* The dataset of a box in a shard: "NAME@8,0", "NAME@0" for a scalar. */
static void box_name(char *out, size_t cap, const char *name, int nd, const int64_t *offset)
{
	size_t n = (size_t)snprintf(out, cap, nd ? "%s@" : "%s@0", name);
	for (int i = 0; i < nd && n < cap; i++)
		n += (size_t)snprintf(out + n, cap - n, "%s%" PRId64, i ? "," : "", offset[i]);
}

static int lay_out_row(hid_t file, hid_t dcpl, const struct ckpt_tensor *t, uint64_t *at)
{
	char name[LONGEST_PATH];
	box_name(name, sizeof name, t->name, t->nd, t->offset);
	hid_t set = dataset_create(file, t->kind, name, t->dtype, t->nd, t->extent, dcpl);
	haddr_t where = set >= 0 ? H5Dget_offset(set) : HADDR_UNDEF;
	int bad = set < 0 || where == HADDR_UNDEF;
	bad |= set >= 0 && H5Dclose(set) < 0;
	*at = (uint64_t)where;
	return bad ? -1 : 0;
}

static hid_t early_contiguous(void)
{
	hid_t dcpl = timeless(H5P_DATASET_CREATE);
	if (dcpl >= 0 && H5Pset_layout(dcpl, H5D_CONTIGUOUS) >= 0 &&
	    H5Pset_alloc_time(dcpl, H5D_ALLOC_TIME_EARLY) >= 0 &&
	    H5Pset_fill_time(dcpl, H5D_FILL_TIME_NEVER) >= 0)
		return dcpl;
	H5Pclose(dcpl);
	return -1;
}

static uint64_t file_end(const struct ckpt_tensor *rows, size_t n, const uint64_t *at)
{
	uint64_t end = 0;
	for (size_t i = 0; i < n; i++) {
		uint64_t bytes = dtype_rows[rows[i].dtype].bytes;
		for (int d = 0; d < rows[i].nd; d++)
			bytes *= (uint64_t)rows[i].extent[d];
		end = at[i] + bytes > end ? at[i] + bytes : end;
	}
	return end;
}

int h5_lay_out(const char *path, const struct ckpt_tensor *rows, size_t n, uint64_t *at, uint64_t *bytes,
               struct err *e)
{
	h5_enter();
	hid_t dcpl = early_contiguous();
	hid_t file = dcpl >= 0 ? file_create(path, H5F_LIBVER_V18, 2048 + 640 * n) : -1;
	int bad = file < 0;
	size_t i = 0;
	for (; i < n && !bad; i++)
		bad = lay_out_row(file, dcpl, &rows[i], &at[i]);
	bad |= file >= 0 && H5Fclose(file) < 0;
	H5Pclose(dcpl);
	h5_leave();
	if (bad)
		return err_set(e, EXIT_IO, "%s: libhdf5 cannot lay the file out (at %s); is the disk full?",
		               path, i ? rows[i - 1].name : "its beginning");
	*bytes = file_end(rows, n, at);
	return 0;
}

/* One piece as a source of the virtual dataset. */
static int map_piece(const struct manifest *m, const struct ckpt_entry *t, const struct piece *p, hid_t dcpl)
{
	char name[LONGEST_PATH] = "/";
	hsize_t offset[CKPT_MAX_DIM], extent[CKPT_MAX_DIM];
	size_t n = (size_t)snprintf(name, sizeof name, "/%s/", t->kind);
	box_name(name + n, sizeof name - n, t->name, t->nd, p->offset);
	for (int i = 0; i < t->nd; i++) {
		offset[i] = (hsize_t)p->offset[i];
		extent[i] = (hsize_t)p->extent[i];
	}
	hid_t whole = space_open(t->nd, t->shape), source = space_open(t->nd, p->extent);
	int bad = whole < 0 || source < 0;
	if (!bad && t->nd)
		bad = H5Sselect_hyperslab(whole, H5S_SELECT_SET, offset, NULL, extent, NULL) < 0;
	if (!bad)
		bad = H5Pset_virtual(dcpl, whole, m->files[p->file].name, name, source) < 0;
	H5Sclose(whole);
	H5Sclose(source);
	return bad ? -1 : 0;
}

/* What a missing shard shows: NaN, or the least integer. */
static int set_fill(hid_t dcpl, enum dtype t)
{
	double nan_value = NAN;
	int64_t least = INT64_MIN;
	int64_t least_32 = INT32_MIN;
	if (t == DT_i32 || t == DT_i64)
		return H5Pset_fill_value(dcpl, H5T_NATIVE_INT64, t == DT_i32 ? &least_32 : &least);
	return H5Pset_fill_value(dcpl, H5T_NATIVE_DOUBLE, &nan_value);
}

static int present_tensor(hid_t file, const struct manifest *m, const struct entry *entry)
{
	struct ckpt_entry t = entry->show;
	hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE), set = -1;
	int bad = dcpl < 0 || set_fill(dcpl, t.dtype) < 0;
	for (size_t i = 0; i < t.n_pieces && !bad; i++)
		bad = map_piece(m, &t, &entry->pieces[i], dcpl);
	if (!bad)
		set = dataset_create(file, t.kind, t.name, t.dtype, t.nd, t.shape, dcpl);
	bad |= set < 0;
	bad |= set >= 0 && H5Dclose(set) < 0;
	H5Pclose(dcpl);
	return bad ? -1 : 0;
}

static int set_attribute(hid_t file, const char *name, hid_t type, const void *value)
{
	hid_t space = H5Screate(H5S_SCALAR);
	hid_t a = H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
	int bad = a < 0 || H5Awrite(a, type, value) < 0;
	bad |= a >= 0 && H5Aclose(a) < 0;
	H5Sclose(space);
	return bad ? -1 : 0;
}

int h5_present(const char *path, const struct manifest *m, struct err *e)
{
	h5_enter();
	hid_t file = file_create(path, H5F_LIBVER_V110, 2048);
	int bad = file < 0;
	size_t i = 0;
	bad = bad || set_attribute(file, "step", H5T_NATIVE_INT64, &m->step);
	bad = bad || set_attribute(file, "world_size", H5T_NATIVE_INT, &m->world_size);
	for (; i < m->n_entries && !bad; i++)
		bad = present_tensor(file, m, &m->entries[i]);
	bad |= file >= 0 && H5Fclose(file) < 0;
	h5_leave();
	if (bad)
		return err_set(e, EXIT_IO, "%s: libhdf5 cannot write the view (at %s); is the disk full?",
		               path, i ? m->entries[i - 1].show.name : "its beginning");
	return 0;
}
